"""One small adapter a denoiser family: which features exist, and where a guide adds to them."""

from pilotfish.denoisers.layout import (
    cross_attention_layers,
    decoder_layers,
    embedding_layers,
    fingerprint,
    skip_channels,
    skip_levels,
)
from pilotfish.denoisers.unet import GuidedPass, Hooks, install

__all__ = [
    "GuidedPass",
    "Hooks",
    "cross_attention_layers",
    "decoder_layers",
    "embedding_layers",
    "fingerprint",
    "install",
    "skip_channels",
    "skip_levels",
]
