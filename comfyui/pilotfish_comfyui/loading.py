"""Guides among ComfyUI's models: where they lie, and their weights under its memory management."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import WrappersMP
from torch import nn

from pilotfish.guides.base import Guide
from pilotfish.interface import GuideError
from pilotfish.refresh import RefreshSteps

from .fitting import KEY, check, check_patches
from .sampling import SamplerWrapper, predict_conditions

FOLDER = "pilotfish_guides"
"""Under ComfyUI's ``models``: each guide is a folder there."""


class GuideModule(nn.Module):
    """A guide as a module whose attributes ComfyUI may set: those of diffusers are fixed."""

    def __init__(self, guide: Guide) -> None:
        super().__init__()
        self.guide = guide


def find_guides(folders: list[str]) -> dict[str, Path]:
    """The guides in some folders, by name: a guide is a folder with a ``config.json``."""
    found: dict[str, Path] = {}
    for root in map(Path, folders):
        for config in sorted(root.rglob("config.json")) if root.is_dir() else ():
            if config.parent != root:
                found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return found


def load_guide(path: Path) -> Any:
    """A guide as a ``ModelPatcher``, which ComfyUI takes to the device when it is needed.

    Raises:
        GuideError: no guide can be read there.
    """
    module = GuideModule(Guide.from_pretrained(path).requires_grad_(False).eval())
    return comfy.model_patcher.ModelPatcher(
        module,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def apply_guide(model: Any, weights: Any, refresh: RefreshSteps | None = None) -> Any:
    """A clone of a ``ModelPatcher`` that samples with a guide; ``model`` stays as it is.

    Args:
        weights: what :func:`load_guide` gave.
        refresh: how many steps of a sampling run both passes, or what ratio of them; None for the
            guide's own.

    Raises:
        GuideError: the model has a guide already, or takes no such guide.
    """
    if KEY in model.additional_models:
        raise GuideError("this model has a guide already; apply one only")
    check(weights.model.guide, model.model, model.get_model_object("model_sampling"))
    check_patches(model.model_options, model.wrappers)
    guided = model.clone()
    guided.set_additional_models(KEY, [weights])
    guided.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, SamplerWrapper(weights, refresh))
    guided.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, predict_conditions)
    return guided
