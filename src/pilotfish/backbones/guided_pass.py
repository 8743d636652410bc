"""One guided use of a denoiser: it asks the guide, and deals out what the guide answers.

It knows what is added and when; :mod:`pilotfish.backbones.unet` knows where in the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch

from pilotfish.backbones.extrapolation import Pushing
from pilotfish.interface import GuideError, GuideInputs, GuideLike, GuideOutput, TextConditions

MIDDLE = "mid_block"
LARGEST = 1e4
"""Of a prediction, whose values are of the order of 1: sampler and decoder square them."""


class _Thread(local):
    """What each thread has of its own. torch.compile looks at it before every call and chooses
    the code for it; a context variable it could not follow, and would give up at each layer."""

    open: GuidedPass | None = None


_HERE = _Thread()


class GuidedPass:
    """One guided use of a denoiser: the guide, its scale, its negative prompt.

    While it is open (``with guided_pass.open():``) every call of a denoiser that has hooks
    for this guide is guided. It belongs to one thread.

    Args:
        guide: the guide.
        guidance_scale: a function that gives w, a number or (N,); asked at every call.
        negative_prompts: a function that gives those of the batch, or one that serves all.
        watch: called before every guided call with its batch size N.
        hooks: those that serve it. One guide may be installed several times on a denoiser (two
            pipelines that share it), and each pass is served once. Left out: any.
    """

    def __init__(
        self,
        guide: GuideLike,
        guidance_scale: Callable[[], float | torch.Tensor],
        negative_prompts: Callable[[], TextConditions],
        watch: Callable[[int], None] = lambda n: None,
        hooks: object | None = None,
    ) -> None:
        self.guide = guide
        self.guidance_scale = guidance_scale
        self.negative_prompts = negative_prompts
        self.watch = watch
        self.hooks = hooks
        self._injection = GuideOutput()
        self._untrained: float | None = None
        self._pushing = Pushing()
        self._denoiser_dtype: torch.dtype | None = None
        self._skips: list[torch.Tensor] = []
        self._pending: list[torch.Tensor | None] = []
        self._due: set[str] = set()

    @staticmethod
    def current() -> GuidedPass | None:
        """The one that is open in this thread."""
        return _HERE.open

    @contextmanager
    def open(self) -> Iterator[GuidedPass]:
        """Guide every denoiser call inside the block."""
        try:
            with current_pass(self):
                yield self
        finally:
            self._forget()
            self._pushing.forget()

    def served_by(self, hooks: object) -> bool:
        """Whether ``hooks`` serve this pass."""
        return self.hooks is None or self.hooks is hooks

    def meddled(self, hooks: object) -> None:
        """Between two calls of the denoiser somebody had the chance to change it; these are its
        hooks now."""
        self.hooks = hooks
        self._pushing.forget()

    def begin(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """A denoiser call starts: ask the guide.

        A scale of at most 1 leaves the call alone, bit for bit.

        Returns:
            The encoder hidden states to go on with.
        """
        self._forget()
        self._injection, self._pushing.gains = GuideOutput(), {}
        n, scale = len(sample), self.guidance_scale()
        if isinstance(scale, torch.Tensor):
            scale = scale.to(sample.device, torch.float32).expand(n)
        elif scale > 1:
            low, high = self.guide.guidance_scale_range
            self._untrained = None if low <= scale <= high else float(scale)
            scale = torch.full((n,), float(scale), device=sample.device)
        else:
            return encoder_hidden_states
        timestep = torch.as_tensor(timestep, device=sample.device)
        # in training a guide may be finer than the denoiser that it is trained on
        self._denoiser_dtype = None if self.guide.dtype == sample.dtype else sample.dtype
        negatives = self.negative_prompts()
        self.watch(n)
        negative = negatives.hidden_states
        self._injection = self.guide(
            GuideInputs(
                latents=self._to_guide(sample[:, : self.guide.config.denoiser["in_channels"]]),
                timestep=timestep.reshape(-1).expand(n),
                guidance_scale=scale,
                encoder_hidden_states=self._to_guide(encoder_hidden_states),
                negative_hidden_states=self._to_guide(negative.expand(n, *negative.shape[1:])),
                added_cond_kwargs={
                    k: self._to_guide(v) for k, v in (added_cond_kwargs or {}).items()
                },
            )
        )
        self._pushing.begin(self._injection.pushes, negatives)
        self._due = {*self._injection.modules, *self._injection.pushes}
        if self._injection.encoder is not None:
            self._due.add(MIDDLE)
        text = self._injection.text
        if text is None:
            return encoder_hidden_states
        return self._to_denoiser(encoder_hidden_states + text)

    def saw(self, *features: torch.Tensor) -> None:
        """The encoder made skip features."""
        if self._injection.encoder is not None:
            self._skips.extend(features)

    def middle(self, mid: torch.Tensor) -> torch.Tensor:
        """The mid block is done: add what belongs to it, keep what belongs to the skips."""
        if self._injection.encoder is None:
            return mid
        self._due.discard(MIDDLE)
        features = tuple(map(self._to_guide, self._skips))
        skips, addition = self._injection.encoder(features, self._to_guide(mid))
        self._pending, self._skips = list(skips), []
        return mid if addition is None else self._to_denoiser(mid + addition)

    def consume(self, skips: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A decoder block takes its skip features, the newest last: add what belongs to them."""
        if not self._pending:
            return skips
        extra, self._pending = self._pending[-len(skips) :], self._pending[: -len(skips)]
        return tuple(
            s if e is None else self._to_denoiser(s + e) for s, e in zip(skips, extra, strict=True)
        )

    def add(self, name: str, entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """A module is done: add what belongs to it."""
        self._due.discard(name)
        addition = self._injection.modules.get(name)
        if addition is None:
            return made
        return self._to_denoiser(made + addition(self._to_guide(entered), self._to_guide(made)))

    def asks(self, name: str, query: torch.Tensor) -> None:
        """A cross-attention layer asks, (N, pixels, width)."""
        self._pushing.asks(name, query)

    def push(self, name: str, layer: Any, answer: torch.Tensor) -> torch.Tensor:
        """A cross-attention layer answers, (N, pixels, width), before its last projection: push
        it on, away from what it would have answered to the negative prompt."""
        return self._push(name, self._pushing.attention(name, layer, answer), answer)

    def pools(self, pooling: Any, given: torch.Tensor, made: torch.Tensor) -> None:
        """The denoiser made (N, E) of the text that it was ``given`` for its embedding."""
        self._pushing.pools(pooling, given, made)

    def embeds(self, embedding: torch.Tensor) -> None:
        """A residual layer is given the embedding of timestep and text, (N, E)."""
        self._pushing.embeds(embedding)

    def push_embedding(self, name: str, layer: Any, answer: torch.Tensor) -> torch.Tensor:
        """A residual layer takes (N, channels) from the embedding: push it on, away from what it
        would take with the negative prompt."""
        return self._push(name, self._pushing.embedding(name, layer, answer), answer)

    def end(self, prediction: torch.Tensor) -> None:
        """The denoiser call is done: nothing may be left that the guide was to add, and at a
        scale that it was not trained at, what it led to must be of use.

        Raises:
            GuideError: the denoiser went past a layer to which the guide adds, or predicted what
                is not finite, or soon will not be.
        """
        if self._due:
            raise GuideError(
                f"the denoiser went past {min(self._due)}, to which the guide adds; undo what "
                "skips or replaces its layers"
            )
        if self._untrained is not None and not prediction.abs().max() <= LARGEST:
            low, high = self.guide.guidance_scale_range
            raise GuideError(
                f"guidance_scale {self._untrained:g} is too far from [{low:g}, {high:g}], where "
                "this guide was trained: the prediction overflows"
            )

    def _push(self, name: str, pushed: torch.Tensor | None, answer: torch.Tensor) -> torch.Tensor:
        if pushed is None:
            return answer
        self._due.discard(name)
        return self._to_denoiser(pushed)

    def _to_guide(self, x: Any) -> Any:
        """What a guide looks at, in its precision."""
        return x if self._denoiser_dtype is None else x.to(self.guide.dtype)

    def _to_denoiser(self, x: torch.Tensor) -> torch.Tensor:
        """What it has added to, in the denoiser's."""
        return x if self._denoiser_dtype is None else x.to(self._denoiser_dtype)

    def _forget(self) -> None:
        # the injection stays: gradient checkpointing runs the decoder once more in the
        # backward pass, when the pass is closed
        self._skips, self._pending, self._due = [], [], set()
        self._untrained = None


@contextmanager
def current_pass(guided: GuidedPass | None) -> Iterator[None]:
    """This one, or none, is the current one inside the block, as it stands: for code that runs
    once more, or in another thread."""
    before, _HERE.open = _HERE.open, guided
    try:
        yield
    finally:
        _HERE.open = before
