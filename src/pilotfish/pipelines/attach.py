"""Attach a guide to a diffusers pipeline, and detach it.

``attach`` gives the pipeline object a subclass of its own class, under the same name (so that
saving and ``AutoPipeline`` still know it), whose ``__call__`` opens a
:class:`~pilotfish.backbones.GuidedPass` around the original one and turns classifier-free guidance
off. ``detach`` gives the class back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from inspect import BoundArguments, signature
from threading import Lock
from typing import Any

import torch

from pilotfish.backbones import Backbone, Hooks, Origin
from pilotfish.interface import GuideError, GuideProtocol
from pilotfish.noise import prediction_type
from pilotfish.pipelines.call import (
    CFG_FLAG,
    CallbackAdapter,
    RunningCall,
    bind,
    warn_of_arguments,
)
from pilotfish.pipelines.control import doubled_controlnets
from pilotfish.pipelines.installing import install, sync
from pilotfish.refresh import RefreshSteps, check_refresh

GUIDER = (
    "its guider makes the second pass and combines the two by a rule of its own, which a guide "
    "does not replace"
)
"""Why HunyuanImage's pipeline and others with a guider are refused. The default rule of that one
(APG) sums up the differences of the steps before, and a guide knows one step."""
NO_GUIDER = "it has no guider, so it makes no second pass"
"""Why they are refused without one, as the distilled models come."""


def attach(guide: GuideProtocol, pipe: Any, refresh: RefreshSteps | None = None) -> None:
    """Attach ``guide`` to ``pipe``.

    The pipeline keeps what it needs of the guide: where precision or device differ it works with
    a copy, and the guide itself stays as it is.

    Args:
        refresh: how many of a call's steps run both passes; what ratio of them, as a float; or
            which, counted from 0. Left out: the ratio that the guide's configuration names.

    Raises:
        GuideError: ``refresh`` is none of those, or needs the weaker model of AutoGuidance, which
            the guide does not hold; a guide is attached already; the pipeline's guidance cannot be
            turned off; the guide was made for another denoiser, or extrapolates attention in a way
            that is not implemented for this one. The pipeline and its denoiser stay as they were.
    """
    if isinstance(pipe, Guided):
        raise GuideError("this pipeline has a guide already; detach it first")
    refresh = check_refresh(guide.refresh_ratio if refresh is None else refresh)
    guidance = guide.guidance
    if refresh and guidance.weak_model is not None and guide.weak_denoiser is None:
        raise GuideError(
            f"this guide was taught AutoGuidance with the weaker model {guidance.weak_model}, "
            "which a refresh would run as well and a guide does not hold; attach it with refresh=0"
        )
    hooks, plain = install(guide, check(guide, pipe)), type(pipe)
    guide.eval()
    pipe.__class__ = type(plain.__name__, (Guided, plain), {"__module__": plain.__module__})
    pipe._pilotfish_guide, pipe._pilotfish_hooks, pipe._pilotfish_lock = guide, hooks, Lock()
    pipe._pilotfish_refresh = refresh


def detach(pipe: Any, guide: GuideProtocol | None = None) -> None:
    """Take the guide off ``pipe``; classifier-free guidance is back, bit for bit.

    Args:
        guide: the one that is expected there, if it matters.

    Raises:
        GuideError: no guide is attached, or another, or a call is running.
    """
    if not isinstance(pipe, Guided):
        raise GuideError("no guide is attached to this pipeline")
    if guide is not None and pipe._pilotfish_guide is not guide:
        raise GuideError("this guide is not attached to this pipeline; another is")
    if not pipe._pilotfish_lock.acquire(blocking=False):
        raise GuideError("this pipeline is running; detach its guide when the call has ended")
    pipe._pilotfish_hooks.remove()
    for name in [n for n in vars(pipe) if n.startswith("_pilotfish_")]:
        delattr(pipe, name)
    pipe.__class__ = type(pipe).__bases__[1]


@contextmanager
def attached(guide: GuideProtocol, pipe: Any, refresh: RefreshSteps | None = None) -> Iterator[Any]:
    """Attach for the length of a block, whatever happens in it.

    Raises:
        GuideError: as :func:`attach`; and at the end of the block as :func:`detach`.
    """
    attach(guide, pipe, refresh)
    try:
        yield pipe
    finally:
        detach(pipe, guide)


@dataclass(frozen=True)
class Refreshed:
    """A guide with both passes in some of the steps, for whoever attaches it later, such as
    :func:`~pilotfish.pipelines.sampling.sample`.

    Attributes:
        guide: the guide.
        refresh: see :func:`attach`.

    Raises:
        GuideError: ``refresh`` is invalid.
    """

    guide: GuideProtocol
    refresh: RefreshSteps | None = None

    def __post_init__(self) -> None:
        if self.refresh is not None:
            check_refresh(self.refresh)

    def attached(self, pipe: Any) -> AbstractContextManager[Any]:
        """The pipeline with it, until the block ends."""
        return attached(self.guide, pipe, self.refresh)


def check(guide: GuideProtocol, pipe: Any) -> list[Backbone]:
    """The backbones of a pipeline that can take this guide: one for each denoiser.

    Raises:
        GuideError: the pipeline's guidance cannot be turned off, or the guide was made for
            another denoiser.
    """
    if hasattr(pipe, "guider"):
        raise _refused(pipe, NO_GUIDER if pipe.guider is None else GUIDER)
    try:
        backbone, *others = Backbone.all_of_pipeline(pipe).values()
    except GuideError as error:
        raise _refused(pipe, str(error)) from error
    call = signature(pipe.__call__).parameters
    if not hasattr(pipe, "encode_prompt"):
        raise _refused(pipe, "it has no encode_prompt, which makes the negative prompt")
    if (why := backbone.refusal(pipe)) is not None:
        raise _refused(pipe, why)
    if not backbone.cfg_by_argument and not hasattr(type(pipe), CFG_FLAG):
        raise _refused(pipe, f"it has no property {CFG_FLAG} that turns its second pass off")
    flagged = CFG_FLAG in signature(type(pipe).encode_prompt).parameters
    if not (flagged or backbone.separate_negative):
        raise _refused(pipe, f"its encode_prompt takes no {CFG_FLAG}")
    if backbone.scale_argument not in call:
        raise _refused(pipe, f"its call takes no {backbone.scale_argument}")
    predicted = prediction_type(pipe.scheduler)
    backbones = [backbone, *others]
    for one in backbones:
        guide.check(one.signature(predicted), Origin.of(one.denoiser))
    return backbones


def _refused(pipe: Any, why: str) -> GuideError:
    return GuideError(f"{type(pipe).__name__} cannot take a guide: {why}; use it without one")


class Guided:
    """Mixed in before a pipeline's own class while a guide is attached to it."""

    _pilotfish_guide: GuideProtocol
    _pilotfish_hooks: Hooks
    _pilotfish_lock: Lock
    _pilotfish_refresh: RefreshSteps = 0
    _pilotfish_copy: GuideProtocol | None = None
    """The guide in the precision and on the device of the pipeline, where they differ."""
    _pilotfish_running: RunningCall | None = None
    _pilotfish_encode: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lock = self._pilotfish_lock
        if not lock.acquire(blocking=False):
            raise GuideError(
                "this pipeline is running in another thread; give each thread a pipeline on the "
                "same weights (pilotfish.pipelines.loading.share_weights) with the guide attached"
            )
        try:
            return self._pilotfish_run(bind(super().__call__, args, kwargs))  # type: ignore[misc]
        finally:
            lock.release()

    def _pilotfish_run(self, call: BoundArguments) -> Any:
        guide = sync(self)
        warn_of_arguments(guide, call, self)
        running = RunningCall(self, guide, call)
        if call.arguments.get("callback_on_step_end"):
            call.arguments["callback_on_step_end"] = CallbackAdapter(call, running)
        # an encode_prompt of the object's own, to weight prompts for example
        own = self._pilotfish_encode = vars(self).get("encode_prompt")
        encode: Any = self.encode_prompt  # type: ignore[has-type]
        self._pilotfish_running = running
        self.encode_prompt = lambda *a, **k: running.encode_prompt(encode, a, k)
        try:
            with (
                running.guided.open(),
                doubled_controlnets(self, running.backbone, running.guided),
            ):
                return super().__call__(*call.args, **call.kwargs)  # type: ignore[misc]
        finally:
            self._pilotfish_running = None
            del self.encode_prompt
            if own is not None:
                self.encode_prompt = own

    @property
    def do_classifier_free_guidance(self) -> bool:
        """False while a guided call runs: the guide takes the second pass's place."""
        plain = super().do_classifier_free_guidance  # type: ignore[misc]
        return self._pilotfish_running is None and bool(plain)

    def prepare_ip_adapter_image_embeds(self, *args: Any, **kwargs: Any) -> Any:
        """The embeddings of the images alone, given or made together with the negative ones, as
        with classifier-free guidance."""
        plain = super().prepare_ip_adapter_image_embeds  # type: ignore[misc]
        flagged = CFG_FLAG in signature(plain).parameters  # others are made in two calls
        running = self._pilotfish_running
        if running is None or not running.needs_guidance or not flagged:
            return plain(*args, **kwargs)
        call = bind(plain, args, kwargs, **{CFG_FLAG: True})
        made = plain(*call.args, **call.kwargs)
        single = isinstance(made, torch.Tensor)  # SD3 takes one IP-Adapter
        halves = [both.chunk(2) for both in ([made] if single else made)]
        running.guided.negative_images = [negative for negative, _ in halves]
        images = [image for _, image in halves]
        return images[0] if single else images

    # -- copies -----------------------------------------------------------------------------

    def __copy__(self) -> Any:
        """A pipeline on the same components, with the guide attached as well."""
        plain = type(self).__bases__[1]
        return _rebuild(
            plain, self._pilotfish_state(), self._pilotfish_guide, self._pilotfish_refresh
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same on components of its own."""
        state = {k: deepcopy(v, memo) for k, v in self._pilotfish_state().items()}
        plain = type(self).__bases__[1]
        return _rebuild(plain, state, self._pilotfish_guide, self._pilotfish_refresh)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as the plain pipeline together with the guide."""
        plain = type(self).__bases__[1]
        state = self._pilotfish_state()
        return _rebuild, (plain, state, self._pilotfish_guide, self._pilotfish_refresh)

    def _pilotfish_state(self) -> dict[str, Any]:
        """The attributes of the plain pipeline, during a call as well."""
        state = {n: v for n, v in vars(self).items() if not n.startswith("_pilotfish_")}
        if self._pilotfish_running is not None:
            del state["encode_prompt"]
            if self._pilotfish_encode is not None:
                state["encode_prompt"] = self._pilotfish_encode
        return state


def _rebuild(
    plain: type, state: dict[str, Any], guide: GuideProtocol, refresh: RefreshSteps = 0
) -> Any:
    made: Any = plain.__new__(plain)  # type: ignore[call-overload]
    vars(made).update(state)
    attach(guide, made, refresh)
    return made
