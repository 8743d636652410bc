"""The guides that can be distilled, ours and the rivals, by the names that settings give them."""

from __future__ import annotations

from typing import Any

import torch

from pilotfish.distill.config import DistillConfig
from pilotfish.distill.material import Material
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
from pilotfish.rivals import (
    AdditiveAdapters,
    CrossAttentionAdapters,
    GuidanceLoRA,
    TextSharpener,
    WholeDenoiser,
)

KINDS: dict[str, type[Guide]] = {
    "tiny": TinyGuide,
    "external": ExternalGuide,
    "full": FullGuide,
    "agd": AdditiveAdapters,
    "agd-attention": CrossAttentionAdapters,
    "dice": TextSharpener,
    "cfg-lora": GuidanceLoRA,
    "guided-distillation": WholeDenoiser,
}


def new_guide(config: DistillConfig, material: Material) -> Guide:
    """The guide that a configuration asks for, fresh."""
    torch.manual_seed(config.seed)
    settings: dict[str, Any] = {
        "guidance_scale_range": (config.guidance_scale_min, config.guidance_scale_max)
    }
    if config.guide == "external":
        settings["reads"] = config.reads
    elif config.guide == "tiny":
        names = ("push", "attention", "embedding", "negative", "rank", "head", "picture")
        settings |= {name: getattr(config, name) for name in names}
    elif config.guide in ("dice", "cfg-lora"):  # a dial around the one scale
        settings = {"trained_scale": config.guidance_scale_max}
    prediction = material.schedule.prediction_type
    return KINDS[config.guide].for_denoiser(material.pipe.unet, prediction, **settings)
