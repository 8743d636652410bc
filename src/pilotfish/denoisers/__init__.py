"""One small adapter a denoiser family: which features exist, and where a guide adds to them."""

from pilotfish.denoisers.compiled import heed_hooks, is_compiled, uncompiled
from pilotfish.denoisers.guided_pass import GuidedPass, current_pass
from pilotfish.denoisers.layout import (
    cross_attention_layers,
    decoder_layers,
    embedding_layers,
    fingerprint,
    skip_channels,
    skip_levels,
)
from pilotfish.denoisers.origin import Origin, portable_path, public_name
from pilotfish.denoisers.unet import Hooks, install

__all__ = [
    "GuidedPass",
    "Hooks",
    "Origin",
    "cross_attention_layers",
    "current_pass",
    "decoder_layers",
    "embedding_layers",
    "fingerprint",
    "heed_hooks",
    "install",
    "is_compiled",
    "portable_path",
    "public_name",
    "skip_channels",
    "skip_levels",
    "uncompiled",
]
