"""Pipelines that a guide does not work on, and why."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

from pilotfish.backbones import Backbone
from pilotfish.pipelines.attach import NO_GUIDER
from tests import components

UNKNOWN = "its denoiser belongs to no family that takes a guide"
DISTILLED = "FluxTransformer2DModel takes in the guidance scale and needs no second pass"
WHY = {
    UNKNOWN: ("AnimateDiffPipeline",),
    DISTILLED: ("FluxPipeline",),
    "it has no encode_prompt, which makes the negative prompt": (
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionImageVariationPipeline",
    ),
    "it has no property do_classifier_free_guidance that turns its second pass off": (
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionLatentUpscalePipeline",
        "StableUnCLIPPipeline",
        "IFPipeline",
        "LEditsPPPipelineStableDiffusion",
    ),
    "its encode_prompt takes no do_classifier_free_guidance": (
        "LEditsPPPipelineStableDiffusionXL",
    ),
    NO_GUIDER: ("HunyuanImagePipeline",),
    "its denoiser takes in the guidance scale and needs no second pass": (
        "LatentConsistencyModelPipeline",
    ),
    "its denoiser projects the text once more (text_proj)": ("StableDiffusionXLPipeline",),
    "its denoiser takes resolution and aspect ratio (PixArt-Alpha at 1024 pixels)": (
        "PixArtAlphaPipeline",
    ),
}
DENOISERS: dict[str, Any] = {
    "FluxPipeline": diffusers.FluxTransformer2DModel,
    "AnimateDiffPipeline": diffusers.UNetMotionModel,
}
"""Of pipelines whose denoiser no family knows."""
CONFIG: dict[str, dict[str, Any]] = {
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 8},
    "FluxPipeline": {"guidance_embeds": True},
    "StableDiffusionXLPipeline": {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 8},
    "PixArtAlphaPipeline": {"use_additional_conditions": True},
}
"""What is particular in the denoiser's configuration."""

PAG = {
    "StableDiffusionPAGPipeline": "SD",
    "StableDiffusionXLPAGPipeline": "SDXL",
    "StableDiffusion3PAGPipeline": "SD3",
    "PixArtSigmaPAGPipeline": "PixArt-Sigma",
}
"""Refused in a call, where ``pag_scale`` is above 0; each with the plain pipeline's name."""

ATTACHED = [(name, why) for why, names in WHY.items() for name in names]
"""Refused when a guide is attached."""


def sentence(name: str, why: str = "") -> str:
    """With which a pipeline is refused."""
    if name in PAG:
        return (
            f"{name} makes a further pass at a pag_scale above 0, and a guide makes none; call it "
            "with pag_scale=0"
        )
    if why == UNKNOWN:
        known = ", ".join(c.__name__ for family in Backbone.registry for c in family.denoisers)
        why = f"{DENOISERS[name].__name__} belongs to no family that takes a guide; known: {known}"
    return f"{name} cannot take a guide: {why}; use it without one"


def build(name: str) -> Any:
    """A pipeline of this class that has a scheduler, a denoiser, and nothing else."""
    kind = getattr(diffusers, name)
    parameters = inspect.signature(kind.__init__).parameters.values()
    parts: dict[str, Any] = {
        p.name: None for p in parameters if p.name != "self" and p.default is p.empty
    }
    component = "unet" if "unet" in parts else "transformer"
    if name in DENOISERS:
        with torch.device("meta"):
            parts[component] = DENOISERS[name](**CONFIG.get(name, {}))
    elif component == "transformer":
        parts[component] = components.pixart_transformer(**CONFIG.get(name, {}))
    else:
        parts[component] = components.unet(addition_embed_type=None, **CONFIG.get(name, {}))
    return kind(**(parts | {"scheduler": components.scheduler("epsilon")}))
