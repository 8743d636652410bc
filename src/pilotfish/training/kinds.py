"""The guides that can be distilled, ours and the rivals, by the names that settings give them."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from baselines import (
    AdditiveAdapters,
    CrossAttentionAdapters,
    GuidanceLoRA,
    TextSharpener,
    WholeDenoiser,
)
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
from pilotfish.training.config import ConfigError, DistillConfig, differing
from pilotfish.training.material import Material

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

PARTS = ("push", "attention", "embedding", "negative", "rank", "head", "picture")
"""What a configuration says of a tiny guide."""
PARTS_NOW = dict(zip(PARTS, ("text", "attention", "modulation", "condition_on_negative", "rank",
                             "head", "uncond_templates"), strict=True))  # fmt: skip


def new_guide(config: DistillConfig, material: Material) -> Guide:
    """The guide that a configuration asks for, fresh."""
    torch.manual_seed(config.seed)
    settings: dict[str, Any] = {
        "guidance_scale_range": (config.guidance_scale_min, config.guidance_scale_max)
    }
    if config.guide == "tiny":
        settings |= {PARTS_NOW[name]: getattr(config, name) for name in PARTS}
    elif config.guide in ("dice", "cfg-lora"):  # a dial around the one scale
        settings = {"trained_scale": config.guidance_scale_max}
    prediction = material.schedule.prediction_type
    return KINDS[config.guide].for_denoiser(material.pipe.unet, prediction, **settings)


def asking_for(guide: Guide, config: DistillConfig) -> DistillConfig:
    """The configuration, asking for a guide like this one wherever it says nothing else: what it
    has at the default.

    Raises:
        ConfigError: it says something else, or the guide is of no kind that can be asked for.
    """
    kind = type(guide)
    name = next((name for name, known in KINDS.items() if known is kind), kind.__name__)
    low, high = guide.guidance_scale_range
    if "trained_scale" in guide.config:  # the range is that of its dial
        low = high = guide.config["trained_scale"]
    like: dict[str, Any] = {"guidance_scale_min": low, "guidance_scale_max": high}
    if isinstance(guide, TinyGuide):
        like |= {part: guide.config[PARTS_NOW[part]] for part in PARTS}
    unsaid = {field.name: field.default for field in fields(config)}
    asked = {k: getattr(config, k) for k in ("guide", *like) if getattr(config, k) != unsaid[k]}
    if "guide" in asked:
        asked["kind"] = asked.pop("guide")
    if differs := differing(asked, like | {"kind": name}):
        raise ConfigError(f"{config.begin_with} cannot be trained further so: {differs}")
    return replace(config, **like | {"guide": name})
