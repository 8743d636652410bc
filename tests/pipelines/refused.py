"""Pipelines that a guide does not work on, and why."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers

from tests import components

WHY = {
    "it has no UNet2DConditionModel": (
        "FluxPipeline",
        "StableDiffusion3Pipeline",
        "PixArtAlphaPipeline",
        "SanaPipeline",
        "QwenImagePipeline",
        "WanPipeline",
        "AnimateDiffPipeline",
    ),
    "it has no encode_prompt, which makes the negative prompt": (
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionImageVariationPipeline",
    ),
    "it does not ask do_classifier_free_guidance whether to make a second pass": (
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionLatentUpscalePipeline",
        "StableUnCLIPPipeline",
        "IFPipeline",
        "LEditsPPPipelineStableDiffusion",
    ),
    "its call takes no guidance_scale": ("LEditsPPPipelineStableDiffusionXL",),
    "its denoiser takes in the guidance scale and needs no second pass": (
        "LatentConsistencyModelPipeline",
    ),
    "its denoiser projects the text once more (text_proj)": ("StableDiffusionXLPipeline",),
}
UNETS = {
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 8},
    "StableDiffusionXLPipeline": {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8},
}
"""What is particular in the UNet's configuration."""

PAG = ("StableDiffusionPAGPipeline", "StableDiffusionXLPAGPipeline")
"""Refused in a call, where ``pag_scale`` is above 0."""

ATTACHED = [(name, why) for why, names in WHY.items() for name in names]
"""Refused when a guide is attached."""


def sentence(name: str, why: str = "") -> str:
    """With which a pipeline is refused."""
    if name in PAG:
        return (
            f"{name} runs the denoiser on a batch of 4 for 2 pictures; turn off what makes "
            "passes beside guidance, such as PAG"
        )
    return f"{name} cannot take a guide: {why}; use it without one"


def build(name: str) -> Any:
    """A pipeline of this class that has a scheduler, a UNet if it takes one, and nothing else."""
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.__init__).parameters.values()
    parts: dict[str, Any] = {
        p.name: None for p in parameters if p.name != "self" and p.default is p.empty
    }
    if "unet" in parts:
        parts["unet"] = components.unet(addition_embed_type=None, **UNETS.get(name, {}))
    return kind(**(parts | {"scheduler": components.scheduler("epsilon")}))
