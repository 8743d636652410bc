"""Hooks that are on a denoiser during single calls of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from threading import get_ident
from typing import Any

import torch

from pilotfish.backbones import Backbone, GuidedPass, Hooks, current_pass, is_compiled
from pilotfish.interface import GuideError, GuideProtocol

CONTROL = "down_block_additional_residuals"
"""The argument of a UNet with what a ControlNet adds."""


class PlacedHooks:
    """The hooks of a guide on a denoiser, which are put on before a call of it and lifted off after
    it. To place them anew at each step would take as long as several layers.

    Args:
        denoiser: as the pipeline calls it.
        failed: called when the denoiser raised an error; pipelines then clean up nothing.

    Raises:
        GuideError: as :meth:`Backbone.install`.

    Attributes:
        denoiser: as given.
        hooks: the library's own, as :meth:`Backbone.install` makes them.
    """

    def __init__(
        self, guide: GuideProtocol, backbone: Backbone, denoiser: Any, failed: Callable[[], None]
    ) -> None:
        self.hooks: Hooks = backbone.install(guide)
        self.denoiser, self._backbone, self._failed = denoiser, backbone, failed
        self._opened = ExitStack()
        self._guided: GuidedPass | None = None
        self._thread: int | None = None
        opens = denoiser.register_forward_pre_hook(
            torch.compiler.disable(self._before), with_kwargs=True, prepend=True
        )
        closes = denoiser.register_forward_hook(
            torch.compiler.disable(self._after), always_call=True
        )
        self._entries: list[tuple[dict[int, Any], int, Any]] = []
        for handle in (opens, *self.hooks.handles, closes):
            refs = (handle.hooks_dict_ref, *handle.extra_dict_ref)
            found = [(there, handle.id) for ref in refs if (there := ref()) is not None]
            self._entries += [(there, key, there[key]) for there, key in found if key in there]
        self.lift()

    def fit(self, guide: GuideProtocol) -> bool:
        """Whether they are this guide's, and the denoiser's modules are still the same."""
        return self.hooks.guide is guide and self.hooks.fit(self._backbone.denoiser)

    @property
    def compiled(self) -> bool:
        """Whether the denoiser is compiled: other hooks would compile it anew."""
        return is_compiled(self.denoiser)

    def put(self, guided: GuidedPass) -> None:
        """Put them on for the next call of the denoiser in this thread."""
        self._guided, self._thread, guided.hooks = guided, get_ident(), self.hooks
        for hooks, key, hook in self._entries:
            hooks[key] = hook

    def lift(self) -> None:
        """Lift them off."""
        self._opened.close()
        self._guided = self._thread = None
        for hooks, key, _ in self._entries:
            hooks.pop(key, None)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        """Open the guided pass: for one call, and not for another thread on the same denoiser."""
        if self._thread != get_ident():
            return
        self._opened.close()  # of a call that was interrupted
        guided, self._guided = self._guided, None
        if guided is None:
            return
        given = dict(zip(self._backbone.parameters, args, strict=False)) | kwargs
        controlled = given.get(CONTROL) is not None
        if controlled and guided.will_double(given["timestep"], self._backbone):
            raise GuideError(
                "a step with both passes needs a ControlNet on both prompts, and in this pipeline "
                "it read one; use the guider with refresh=0"
            )
        self._opened.enter_context(current_pass(guided))

    def _after(self, module: Any, args: Any, output: Any) -> None:
        if self._thread != get_ident():
            return
        self._opened.close()
        if output is None:
            self._failed()
