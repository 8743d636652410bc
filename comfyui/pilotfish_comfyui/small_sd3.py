"""The transformer among Pilotfish's bundled models as one more model that ComfyUI loads.

ComfyUI tells models apart by the sizes of their tensors, and knows Stable Diffusion 3 with latents
of 16 channels, as many blocks as heads, and patches of 2 pixels. The bundled one has 8 channels, 8
blocks of 3 heads, and patches of 1 pixel.
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper


class SmallLatents(comfy.latent_formats.LatentFormat):
    """Neither scaled nor shifted, as the bundled autoencoder makes them."""

    latent_channels = 8


class PixelMMDiT(OpenAISignatureMMDITWrapper):
    """With patches of 1 pixel: ComfyUI counts those of an image as ``(size + 1) // patch``, which
    rounds up for 2."""

    def cropped_pos_embed(self, hw: tuple[int, int], device: Any = None) -> torch.Tensor:
        """(1, h w, d) the embeddings of the positions."""
        made: torch.Tensor = super().cropped_pos_embed((hw[0] - 1, hw[1] - 1), device)
        return made

    def unpatchify(self, x: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
        """(N, h w, C) -> (N, C, h, w)."""
        made: torch.Tensor = super().unpatchify(x, hw=(hw[0] - 1, hw[1] - 1))
        return made


class SmallSD3(comfy.model_base.SD3):
    """``comfy.model_base.SD3`` with a :class:`PixelMMDiT`."""

    def __init__(self, config: Any, device: Any = None) -> None:
        kind = comfy.model_base.ModelType.FLOW
        comfy.model_base.BaseModel.__init__(
            self, config, kind, device=device, unet_model=PixelMMDiT
        )


class PilotfishSD3(comfy.supported_models.SD3):
    """Stable Diffusion 3 in the bundled sizes."""

    unet_config: ClassVar[dict[str, Any]] = {
        "in_channels": 8, "patch_size": 1, "depth": 3, "pos_embed_scaling_factor": None,
    }  # fmt: skip
    unet_extra_config: ClassVar[dict[str, Any]] = {"num_blocks": 8}
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 1.0}
    latent_format = SmallLatents

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> SmallSD3:
        """The model without weights."""
        return SmallSD3(self, device=device)


def register() -> None:
    """Add it to the models that ComfyUI's loaders know, once."""
    known = comfy.supported_models.models
    if PilotfishSD3.__name__ not in (model.__name__ for model in known):
        known.append(PilotfishSD3)
