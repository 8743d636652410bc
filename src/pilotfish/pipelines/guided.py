"""A pipeline with a guide on it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from inspect import BoundArguments
from threading import Lock
from typing import Any

from pilotfish.backbones import GuidedPass, Hooks, is_compiled
from pilotfish.interface import GuideError, GuideLike, TextConditions
from pilotfish.pipelines.arguments import bind, warn_of_arguments
from pilotfish.pipelines.callbacks import Undoubled, Watch
from pilotfish.pipelines.fitting import ASKS, sit


class Guided:
    """Mixed in before a pipeline's own class while a guide is attached to it."""

    _pilotfish_guide: GuideLike
    _pilotfish_hooks: Hooks
    _pilotfish_drawing: Lock
    _pilotfish_negative: TextConditions | None = None
    _pilotfish_pictures: int = 0
    _pilotfish_open: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        drawing = self._pilotfish_drawing
        if not drawing.acquire(blocking=False):
            raise GuideError(
                "this pipeline is drawing already; for another thread make one on the same weights "
                "(pilotfish.pipelines.sibling) and attach the guide to it as well"
            )
        try:
            return self._pilotfish_draw(bind(self._pilotfish_call, args, kwargs))
        finally:
            drawing.release()

    def _pilotfish_draw(self, call: BoundArguments) -> Any:
        guide = self._pilotfish_guide
        sit(guide, self)
        warn_of_arguments(guide, call, self)
        guided = GuidedPass(
            guide,
            lambda: self.guidance_scale,  # type: ignore[attr-defined]
            self._pilotfish_negatives,
            Watch(guide, self),
            self._pilotfish_hooks,
        )
        if call.arguments.get("callback_on_step_end"):
            call.arguments["callback_on_step_end"] = Undoubled(call, guided)
        self._pilotfish_open, self._pilotfish_negative, self._pilotfish_pictures = True, None, 0
        try:
            with guided.open():
                return super().__call__(*call.args, **call.kwargs)  # type: ignore[misc]
        finally:
            self._pilotfish_open, self._pilotfish_negative = False, None

    @property
    def _pilotfish_call(self) -> Callable[..., Any]:
        """The call of the pipeline's own class."""
        call: Callable[..., Any] = super().__call__  # type: ignore[misc]
        return call

    def __copy__(self) -> Any:
        """A pipeline without the guide, on the same parts: a guide is put on one pipeline."""
        return self._pilotfish_plain(lambda part: part)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same on parts of its own."""
        return self._pilotfish_plain(partial(deepcopy, memo=memo))

    def _pilotfish_plain(self, part: Callable[[Any], Any]) -> Any:
        """A pipeline of the plain class on each ``part`` of this one."""
        kind: Any = type(self).__bases__[1]
        made = kind.__new__(kind)
        mine = {n: v for n, v in vars(self).items() if not n.startswith("_pilotfish_")}
        vars(made).update({name: part(value) for name, value in mine.items()})
        return made

    @property
    def do_classifier_free_guidance(self) -> bool:
        """No, while a guided call is running: the guide takes the second pass's place."""
        return not self._pilotfish_open and super().do_classifier_free_guidance  # type: ignore[misc,no-any-return]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline does it, and the negative prompt as well, kept for the guide. Whoever
        encodes further texts while the call runs, such as a callback, is given what is asked."""
        plain = super().encode_prompt  # type: ignore[misc]
        if not self._pilotfish_guides or self._pilotfish_negative is not None:
            return plain(*args, **kwargs)
        call = bind(plain, args, kwargs, **{ASKS: True})
        encoded = plain(*call.args, **call.kwargs)
        # of SDXL: prompt, negative, and both pooled; copies, for they may be the caller's own
        negatives = TextConditions(*(x.clone() for x in encoded[1:4:2]))
        self._pilotfish_pictures = len(negatives)
        self._pilotfish_push_from(negatives)
        return encoded

    def _pilotfish_push_from(self, negatives: TextConditions) -> None:
        """Keep the negative prompts of the batch for the guide."""
        # a graph is compiled for one negative prompt or for as many as pictures, not for both
        compiled = is_compiled(self.unet)  # type: ignore[attr-defined]
        self._pilotfish_negative = negatives if compiled else negatives.shared()

    def prepare_ip_adapter_image_embeds(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the pictures alone, given or made together with the negative ones, as with
        classifier-free guidance."""
        plain = super().prepare_ip_adapter_image_embeds  # type: ignore[misc]
        if not self._pilotfish_guides:
            return plain(*args, **kwargs)
        call = bind(plain, args, kwargs, **{ASKS: True})
        return [both.chunk(2)[1] for both in plain(*call.args, **call.kwargs)]

    def _pilotfish_negatives(self) -> TextConditions:
        """The negative prompts of the call that is running.

        Raises:
            GuideError: it began without guidance, and so without them.
        """
        if self._pilotfish_negative is None:
            raise GuideError(
                "this call began at a guidance scale of at most 1 and encoded no negative prompt; "
                "begin it above 1 and lower the scale for the steps that are to go without guidance"
            )
        return self._pilotfish_negative

    @property
    def _pilotfish_guides(self) -> bool:
        """Whether a guided call is running, at a scale that needs guidance."""
        return self._pilotfish_open and self.guidance_scale > 1  # type: ignore[attr-defined,no-any-return]
