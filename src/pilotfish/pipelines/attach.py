"""Attach a guide to a diffusers pipeline, and detach it.

``attach`` gives the pipeline object a subclass of its own class, under the same name (so that
saving and ``AutoPipeline`` still know it), whose ``__call__`` opens a
:class:`~pilotfish.backbones.GuidedPass` around the original one and turns classifier-free guidance
off. ``detach`` gives the class back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from threading import Lock
from typing import Any

from pilotfish.backbones import Backbone, Origin
from pilotfish.interface import GuideError, GuideProtocol
from pilotfish.noise import prediction_type
from pilotfish.pipelines.guided import CFG_FLAG, Guided


def attach(guide: GuideProtocol, pipe: Any) -> None:
    """Attach ``guide`` to ``pipe``.

    The pipeline keeps what it needs of the guide: where precision or device differ it works with
    a copy, and the guide itself stays as it is.

    Raises:
        GuideError: the pipeline's guidance cannot be turned off, another guide is attached
            already, or the guide was made for another denoiser. The pipeline and its denoiser
            stay as they were.
    """
    if isinstance(pipe, Guided):
        raise GuideError("this pipeline has a guide already; detach it first")
    backbone = check(guide, pipe)
    hooks, plain = backbone.install(guide), type(pipe)
    guide.eval()
    pipe.__class__ = type(plain.__name__, (Guided, plain), {"__module__": plain.__module__})
    pipe._pilotfish_guide, pipe._pilotfish_hooks, pipe._pilotfish_lock = guide, hooks, Lock()


def detach(pipe: Any, guide: GuideProtocol | None = None) -> None:
    """Take the guide off ``pipe``; classifier-free guidance is back, bit for bit.

    Args:
        guide: the one that is expected there, if it matters.

    Raises:
        GuideError: no guide is attached, or another.
    """
    if not isinstance(pipe, Guided):
        raise GuideError("no guide is attached to this pipeline")
    if guide is not None and pipe._pilotfish_guide is not guide:
        raise GuideError("this guide is not attached to this pipeline; another is")
    pipe._pilotfish_hooks.remove()
    for name in [n for n in vars(pipe) if n.startswith("_pilotfish_")]:
        delattr(pipe, name)
    pipe.__class__ = type(pipe).__bases__[1]


@contextmanager
def attached(guide: GuideProtocol, pipe: Any) -> Iterator[Any]:
    """Attach for the length of a block, whatever happens in it."""
    attach(guide, pipe)
    try:
        yield pipe
    finally:
        detach(pipe, guide)


def check(guide: GuideProtocol, pipe: Any) -> Backbone:
    """The backbone of a pipeline that can take this guide.

    Raises:
        GuideError: the pipeline's guidance cannot be turned off, or the guide was made for
            another denoiser.
    """
    try:
        backbone = Backbone.of_pipeline(pipe)
    except GuideError as error:
        raise _refused(pipe, str(error)) from error
    call = signature(pipe.__call__).parameters
    if not hasattr(pipe, "encode_prompt"):
        raise _refused(pipe, "it has no encode_prompt, which makes the negative prompt")
    if not backbone.cfg_by_argument and not hasattr(type(pipe), CFG_FLAG):
        raise _refused(pipe, f"it has no property {CFG_FLAG} that turns its second pass off")
    if CFG_FLAG not in signature(type(pipe).encode_prompt).parameters:
        raise _refused(pipe, f"its encode_prompt takes no {CFG_FLAG}")
    if "guidance_scale" not in call:
        raise _refused(pipe, "its call takes no guidance_scale")
    if (why := backbone.refusal(pipe)) is not None:
        raise _refused(pipe, why)
    predicted = prediction_type(pipe.scheduler)
    guide.check(backbone.signature(predicted), Origin.of(backbone.denoiser))
    return backbone


def _refused(pipe: Any, why: str) -> GuideError:
    return GuideError(f"{type(pipe).__name__} cannot take a guide: {why}; use it without one")
