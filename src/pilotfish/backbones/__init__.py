"""One small adapter a denoiser family: which features exist, and where a guide adds to them."""

from pilotfish.backbones.compiled import heed_hooks, is_compiled, uncompiled
from pilotfish.backbones.guided_pass import GuidedPass, current_pass
from pilotfish.backbones.layout import (
    cross_attention_layers,
    decoder_layers,
    embedding_layers,
    fingerprint,
    skip_channels,
    skip_levels,
)
from pilotfish.backbones.origin import Origin, portable_path, public_name
from pilotfish.backbones.unet import Hooks, install

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
