"""The arguments of a pipeline's call: what a guide can do nothing about is warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import BoundArguments, signature
from typing import Any

import torch

from pilotfish.interface import GuideError, GuideLike

SECOND_PASS = (
    "guidance_rescale",
    "guess_mode",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
    "negative_aesthetic_score",
)
"""Arguments of a pipeline's call that act on the second pass only."""


def bind(method: Callable[..., Any], args: Any, kwargs: Any, **changes: Any) -> BoundArguments:
    """The arguments of a method by their names, some of them changed."""
    call = signature(method).bind(*args, **kwargs)
    call.arguments |= changes
    return call


def warn_of_arguments(guide: GuideLike, call: BoundArguments, pipe: Any) -> None:
    """What a call asks for that a guide cannot give.

    Raises:
        GuideError: a guidance scale that is no finite number.
    """
    usual = {name: p.default for name, p in call.signature.parameters.items()}
    given = usual | call.arguments
    if "guess_mode" in given:  # some ControlNets ask for it themselves
        nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
        given["guess_mode"] |= any(n.config.get("global_pool_conditions") for n in nets)
    scale = given["guidance_scale"]
    if not abs(scale) <= torch.finfo(torch.float32).max:  # nor is what is not a number
        raise GuideError(f"guidance_scale must be a finite number in single precision, not {scale}")
    if scale <= 1:
        return
    low, high = guide.guidance_scale_range
    if not low <= scale <= high:
        warnings.warn(
            f"guidance_scale {scale} lies outside [{low}, {high}], where this guide was trained",
            stacklevel=4,
        )
    for name in SECOND_PASS:
        if name in given and given[name] != usual[name]:
            warnings.warn(
                f"{name} acts on the second pass, and a guide makes none",
                stacklevel=4,
            )
