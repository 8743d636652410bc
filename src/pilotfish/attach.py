"""A guide on a diffusers pipeline: the user's call stays as it is, the second pass is gone.

``attach`` gives the pipeline object a subclass of its own class, under the same name (so
that saving and ``AutoPipeline`` still know it), whose ``__call__`` opens a
:class:`~pilotfish.denoisers.GuidedPass` around the original one and answers "no" when the
pipeline asks whether it should run classifier-free guidance. ``detach`` gives the class back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pilotfish.contract import GuideError, GuideLike
from pilotfish.denoisers import GuidedPass, Hooks, fingerprint, install


class Guided:
    """Mixed in before a pipeline's own class while a guide is attached to it."""

    _pilotfish_guide: GuideLike
    _pilotfish_hooks: Hooks
    _pilotfish_negative: torch.Tensor
    _pilotfish_open: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        guide = self._pilotfish_guide
        _place_beside(guide, self.unet)  # type: ignore[attr-defined]
        if kwargs.get("guidance_rescale"):
            warnings.warn("guidance_rescale has no second pass to act on; ignored", stacklevel=2)
        guided = GuidedPass(
            guide,
            lambda: self.guidance_scale,  # type: ignore[attr-defined]
            lambda: self._pilotfish_negative,
            _Watch(guide, self),
        )
        self._pilotfish_open = True
        try:
            with guided.open():
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._pilotfish_open = False
            self._pilotfish_negative = torch.empty(0)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """No, while a guided call is running: the guide takes the second pass's place."""
        return not self._pilotfish_open and super().do_classifier_free_guidance  # type: ignore[misc,no-any-return]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline does it, and the negative prompt as well, kept for the guide."""
        if not self._pilotfish_open or self.guidance_scale <= 1:  # type: ignore[attr-defined]
            return super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        if "do_classifier_free_guidance" in kwargs:
            kwargs["do_classifier_free_guidance"] = True
        else:  # prompt, device, num_images_per_prompt, do_classifier_free_guidance, ...
            args = (*args[:3], True, *args[4:])
        encoded = super().encode_prompt(*args, **kwargs)  # type: ignore[misc]
        self._pilotfish_negative = encoded[1]
        _warn_outside_range(self._pilotfish_guide, self.guidance_scale)  # type: ignore[attr-defined]
        return encoded


def attach(guide: GuideLike, pipe: Any) -> None:
    """Put ``guide`` on ``pipe``.

    Raises:
        GuideError: the pipeline has no UNet, another guide is attached already, or the
            guide was made for another denoiser.
    """
    if isinstance(pipe, Guided):
        raise GuideError("this pipeline has a guide already; detach it first")
    unet = getattr(pipe, "unet", None)
    if unet is None or not hasattr(pipe, "encode_prompt"):
        raise GuideError(f"{type(pipe).__name__} has no UNet with a text prompt to guide")
    guide.check(fingerprint(unet, pipe.scheduler.config.prediction_type))
    guide.eval()
    hooks, plain = install(guide, unet), type(pipe)
    pipe.__class__ = type(plain.__name__, (Guided, plain), {"__module__": plain.__module__})
    pipe._pilotfish_guide, pipe._pilotfish_hooks = guide, hooks


def detach(guide: GuideLike, pipe: Any) -> None:
    """Take ``guide`` off ``pipe``.

    Raises:
        GuideError: it is not attached there.
    """
    if not isinstance(pipe, Guided) or pipe._pilotfish_guide is not guide:
        raise GuideError("this guide is not attached to this pipeline")
    pipe._pilotfish_hooks.remove()
    for name in [n for n in vars(pipe) if n.startswith("_pilotfish_")]:
        delattr(pipe, name)
    pipe.__class__ = type(pipe).__bases__[1]


@contextmanager
def attached(guide: GuideLike, pipe: Any) -> Iterator[Any]:
    """Attach for the length of a block, whatever happens in it."""
    attach(guide, pipe)
    try:
        yield pipe
    finally:
        detach(guide, pipe)


class _Watch:
    """Warns once in a call when a guide distilled to few steps is asked for others."""

    def __init__(self, guide: GuideLike, pipe: Any) -> None:
        self.known, self.pipe = guide.timesteps, pipe

    def __call__(self) -> None:
        if self.known is None:
            return
        known, scheduler, self.known = self.known, self.pipe.scheduler, None
        asked = tuple(int(t) for t in scheduler.timesteps)
        # Euler's steps are DDIM's; solvers that look back on earlier steps would do twice what
        # the guide has learnt to do
        name = type(scheduler).__name__
        if asked == known and name.startswith(("DDIM", "Euler")):
            return
        warnings.warn(
            f"this guide was distilled for {len(known)} DDIM steps at the timesteps "
            f"{', '.join(str(t) for t in known)}, but {name} takes {len(asked)} at "
            f"{', '.join(str(t) for t in asked)}; use num_inference_steps={len(known)} and a "
            'DDIMScheduler with timestep_spacing="trailing"', stacklevel=2,
        )  # fmt: skip


def _place_beside(guide: GuideLike, unet: Any) -> None:
    """Move the guide to the denoiser's device and dtype, if it is not there."""
    if (guide.device, guide.dtype) != (unet.device, unet.dtype):
        guide.to(unet.device, unet.dtype)


def _warn_outside_range(guide: GuideLike, scale: float) -> None:
    low, high = guide.guidance_scale_range
    if not low <= scale <= high:
        warnings.warn(
            f"guidance_scale {scale} lies outside [{low}, {high}], where this guide was trained",
            stacklevel=4,
        )
