"""A guide on a diffusers pipeline: the user's call stays as it is, the second pass is gone.

``attach`` gives the pipeline object a subclass of its own class, under the same name (so
that saving and ``AutoPipeline`` still know it), whose ``__call__`` opens a
:class:`~pilotfish.backbones.GuidedPass` around the original one and answers "no" when the
pipeline asks whether it should run classifier-free guidance. ``detach`` gives the class back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from pilotfish.backbones import install
from pilotfish.interface import GuideError, GuideLike
from pilotfish.pipelines.fitting import check
from pilotfish.pipelines.guided import Guided

__all__ = ["attach", "attached", "check", "detach"]


def attach(guide: GuideLike, pipe: Any) -> None:
    """Put ``guide`` on ``pipe``.

    Raises:
        GuideError: the pipeline does not leave guidance to a guide, another guide is attached
            already, or the guide was made for another denoiser.
    """
    if isinstance(pipe, Guided):
        raise GuideError("this pipeline has a guide already; detach it first")
    hooks, plain = install(guide, check(guide, pipe)), type(pipe)
    guide.eval()
    pipe.__class__ = type(plain.__name__, (Guided, plain), {"__module__": plain.__module__})
    pipe._pilotfish_guide, pipe._pilotfish_hooks, pipe._pilotfish_drawing = guide, hooks, Lock()


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
