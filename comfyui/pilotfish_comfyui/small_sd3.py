"""The transformer among Pilotfish's bundled models as one more model that ComfyUI loads.

ComfyUI tells models apart by the sizes of their tensors, and knows Stable Diffusion 3 with latents
of 16 channels and as many blocks as heads. The bundled one has 8 channels, 3 heads and 8 blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.supported_models


class SmallLatents(comfy.latent_formats.LatentFormat):
    """Neither scaled nor shifted, as the bundled autoencoder makes them."""

    latent_channels = 8


class PilotfishSD3(comfy.supported_models.SD3):
    """Stable Diffusion 3 in the bundled sizes."""

    unet_config: ClassVar[dict[str, Any]] = {
        "in_channels": 8, "patch_size": 1, "depth": 3, "pos_embed_scaling_factor": None,
    }  # fmt: skip
    unet_extra_config: ClassVar[dict[str, Any]] = {"num_blocks": 8}
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 1.0}
    latent_format = SmallLatents


def register() -> None:
    """Add it to the models that ComfyUI's loaders know, once."""
    known = comfy.supported_models.models
    if PilotfishSD3.__name__ not in (model.__name__ for model in known):
        known.append(PilotfishSD3)
