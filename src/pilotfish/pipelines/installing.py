"""A guide's hooks on the denoisers of a pipeline, put there and kept up to date."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch

from pilotfish.backbones import Backbone, Hooks, Origin, is_compiled, watch_hooks
from pilotfish.interface import GuideError, GuideProtocol
from pilotfish.noise import prediction_type


def has_compiled(pipe: Any) -> bool:
    """Whether a denoiser of a pipeline is compiled."""
    return any(is_compiled(getattr(pipe, name)) for name in Backbone.all_of_pipeline(pipe))


def install(guide: GuideProtocol, backbones: Iterable[Backbone]) -> Hooks:
    """A guide's hooks on all denoisers of a pipeline.

    Raises:
        GuideError: as :meth:`Backbone.install`. No hook is left behind.
    """
    first, *others = backbones
    hooks = first.install(guide)
    try:
        for backbone in others:
            hooks.join(backbone.install(guide))
    except BaseException:
        hooks.remove()
        raise
    return hooks


def sync(pipe: Any) -> GuideProtocol:
    """Before a step: the guide on the pipeline's device and in its precision, and its hooks on the
    denoisers as they are now.

    Returns:
        The guide that the pipeline works with.

    Raises:
        GuideError: the guide does not fit the denoiser or scheduler that the pipeline has now.
    """
    backbones = Backbone.all_of_pipeline(pipe).values()
    denoisers, guide = [backbone.denoiser for backbone in backbones], pipe._pilotfish_guide
    predicted = prediction_type(pipe.scheduler)
    if predicted != guide.config.signature["prediction_type"]:
        raise GuideError(
            f"this guide was trained on a denoiser that predicts "
            f"{guide.config.signature['prediction_type']}, and the pipeline's scheduler takes its "
            f"prediction for {predicted}; set prediction_type in the scheduler's configuration"
        )
    # "cuda" and "cuda:0" are one device but compare unequal
    place, dtype = torch.empty(0, device=pipe._execution_device).device, denoisers[0].dtype
    if (guide.device, guide.dtype) != (place, dtype):
        copied = pipe._pilotfish_copy
        if copied is None or (copied.device, copied.dtype) != (place, dtype):
            pipe._pilotfish_copy = deepcopy(guide).to(place, dtype)
        guide = pipe._pilotfish_copy
    else:
        pipe._pilotfish_copy = None
    hooks = pipe._pilotfish_hooks
    if hooks.guide is not guide or not hooks.fit(*denoisers):
        for backbone in backbones:
            guide.check(backbone.signature(predicted), Origin.of(backbone.denoiser))
        fresh = install(guide, backbones)
        hooks.remove()
        pipe._pilotfish_hooks = fresh
    if has_compiled(pipe):
        watch_hooks(len(guide.extrapolated) + len(guide.target_modules))
    working: GuideProtocol = guide
    return working
