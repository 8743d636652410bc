"""One small adapter a denoiser family: which features exist, and where a guide adds to them."""

from pilotfish.denoisers.unet import (
    GuidedPass,
    Hooks,
    cross_attention_layers,
    decoder_layers,
    fingerprint,
    install,
    skip_channels,
    skip_levels,
)

__all__ = [
    "GuidedPass",
    "Hooks",
    "cross_attention_layers",
    "decoder_layers",
    "fingerprint",
    "install",
    "skip_channels",
    "skip_levels",
]
