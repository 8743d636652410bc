"""One guided pass of a denoiser: it runs the guide and keeps the output for the hooks.

Hooks find the guided pass that is open in their thread here (:meth:`GuidedPass.current`), so a
plain pipeline that shares the denoiser is never guided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import local
from typing import Any, Protocol

import torch

from pilotfish.backbones.cache import TABLE_BYTES, CallCache, step_of
from pilotfish.interface import (
    GuideError,
    GuideInputs,
    GuideOutput,
    GuideProtocol,
    Refresh,
    TextConditions,
)
from pilotfish.refresh import new_refresh

LARGEST = 1e4
"""Of a prediction, whose values are of the order of 1: sampler and decoder square them."""


@dataclass(frozen=True)
class DenoiserCall:
    """The arguments of one denoiser call, by their meaning.

    Attributes:
        latents: (N, C, h, w), on the grid of tokens; see :class:`GuideInputs`.
        timestep: in the denoiser's own convention.
        text: N prompts.
        added_cond_kwargs: see :class:`GuideInputs`.
    """

    latents: torch.Tensor
    timestep: Any
    text: TextConditions
    added_cond_kwargs: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Times(Protocol):
    """How a family's timesteps are turned into normalised time."""

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        """Of the timesteps that the denoiser is given."""
        ...

    def schedule_time(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Of a scheduler's."""
        ...


class _Thread(local):
    """What each thread has of its own. torch.compile reads it before every call and chooses the
    code by it. A context variable would break the graph at each layer; a default of the class
    would be what older versions of torch read."""

    def __init__(self) -> None:
        self.open: GuidedPass | None = None


_HERE = _Thread()


class GuidedPass:
    """A guide with its scale and negative prompt, for one call of a pipeline or one training step.

    While it is open (``with guided_pass.open():``) every call of a denoiser that has hooks for
    this guide is guided. It belongs to one thread.

    Args:
        guide: the guide.
        guidance_scale: gives w, a number or (N,); called at every denoiser call.
        negative: gives the N negative prompts, or one that serves all.
        timesteps: gives the timesteps of the whole schedule, where they are known: what depends
            on time, scale and text alone is then computed for all of them at once.
        step: gives the place of the running step in that schedule, for denoisers that are given
            timesteps of their own; None where it is not known.
        refresh_at: gives the denoiser calls, counted from 0, that run both passes, from the number
            of calls.
        check_batch: called before every guided call with its batch size N.
        hooks: those that serve it. A guide can be installed several times on one denoiser (two
            pipelines that share it), and each pass is served once. Left out: any.
    """

    def __init__(
        self,
        guide: GuideProtocol,
        guidance_scale: Callable[[], float | torch.Tensor],
        negative: Callable[[], TextConditions],
        *,
        timesteps: Callable[[], torch.Tensor | None] = lambda: None,
        step: Callable[[], int | None] = lambda: None,
        refresh_at: Callable[[int], tuple[int, ...]] = lambda steps: (),
        check_batch: Callable[[int], None] = lambda n: None,
        hooks: object | None = None,
    ) -> None:
        self.guide, self.guidance_scale, self.negative_prompts = guide, guidance_scale, negative
        self.guidance = guide.guidance  # read here: a compiled call cannot read a configuration
        self.timesteps, self.check_batch, self.hooks = timesteps, check_batch, hooks
        self.refresh_at, self.step = refresh_at, step
        self.output = GuideOutput()
        self.active = False
        self.doubled = False
        """Whether the running denoiser call runs both passes, in one doubled batch."""
        self.refreshing = False
        """Whether it has not found the difference yet."""
        self.refresh: Refresh | None = None
        """What the last of them found."""
        self.degraded: torch.Tensor | None = None
        """The prediction of a degraded denoiser in a call with both passes, where the guidance that
        the guide was taught has one."""
        self.negative_images: list[torch.Tensor] | None = None
        """Embeddings that stand for no image, where an IP-Adapter is used."""
        self._calls = 0
        self._places: tuple[int, ...] | None = None
        self._began: tuple[Any, GuideInputs] | None = None
        self.call: DenoiserCall | None = None
        self.negative = self._given_negative = TextConditions(torch.empty(0))
        self.scratch: dict[Any, Any] = {}
        """Values that hooks of one denoiser call pass to later hooks."""
        self._denoiser_dtype: torch.dtype | None = None
        self._untrained: float | None = None
        self._weights: dict[str, torch.Tensor] = {}
        self._due: set[str] = set()
        self.cache = CallCache()

    @staticmethod
    def current() -> GuidedPass | None:
        """The guided pass that is open in this thread."""
        return _HERE.open

    @contextmanager
    def open(self) -> Iterator[GuidedPass]:
        """Guide every denoiser call inside the block."""
        try:
            with current_pass(self):
                yield self
        finally:
            # the output stays: gradient checkpointing runs blocks again in the backward pass
            self._due, self.cache = set(), CallCache()
            self.refresh, self._calls, self._places = None, 0, None

    def forget_refresh(self) -> None:
        """Forget what the last refresh found, after prompts or denoiser have changed."""
        self.refresh = None

    def invalidate(self, hooks: object) -> None:
        """Clear the cache after a callback, which may have changed the denoiser.

        Args:
            hooks: of the denoiser as it is now.
        """
        if hooks is not self.hooks:  # the difference is another denoiser's
            self.forget_refresh()
        self.hooks = hooks
        self.cache.clear()

    # -- one denoiser call --------------------------------------------------------------

    def begin(self, call: DenoiserCall, times: Times) -> None:
        """A denoiser call starts: run the guide, unless the scale is at most 1 or the call runs
        both passes."""
        self.active = self.doubled = self.refreshing = False
        if self.call is not None and self.call.latents.shape[-2:] != call.latents.shape[-2:]:
            self.cache.clear()  # positions of tokens depend on it
        self.output, self.call = GuideOutput(), call
        number, self._calls = self._calls, self._calls + 1
        self.scratch, self._due, self._weights, self._untrained = {}, set(), {}, None
        n, scale = len(call.latents), self.guidance_scale()
        if not isinstance(scale, torch.Tensor):
            if scale <= 1:
                return
            low, high = self.guide.guidance_scale_range
            self._untrained = None if low <= scale <= high else float(scale)
        # in training a guide may be finer than the denoiser that it is trained on
        same = self.guide.dtype == call.latents.dtype
        self._denoiser_dtype = None if same else call.latents.dtype
        negative = self.negative_prompts()
        self.check_batch(n)
        if negative is not self._given_negative:
            self.cache.clear()
            # a pipeline casts its own negative prompts on the way to the denoiser
            same = negative.dtype == call.text.dtype
            self._given_negative = negative
            self.negative = negative if same else negative.to(call.text.dtype)
        if self.refresh is not None and self.refresh.latents.shape != call.latents.shape:
            self.forget_refresh()
        if number in self._refreshes(call.timestep, number, times):
            self.doubled = self.refreshing = True
            place = call.latents.device
            now = times.time(torch.as_tensor(call.timestep, device=place)).reshape(-1).expand(n)
            w = torch.as_tensor(scale, dtype=torch.float32, device=place).expand(n)
            inputs = self._inputs(call, now.contiguous(), w)
            if inputs.refresh is None:  # laid out as a known one: a compiled graph is made once
                inputs = replace(inputs, refresh=Refresh.unknown(inputs.latents, now))
            self._began = scale, inputs
            return
        self.active = True
        inputs, modulations = self._scheduled(call, number, scale, times)
        self.output = self.guide(inputs, modulations)
        gains = self.output.gains
        if gains and self._denoiser_dtype is None:
            self._weights = dict(zip(gains, torch._foreach_neg(tuple(gains.values())), strict=True))
        self._due = {*self.output.residuals, *gains}

    def will_double(self, timestep: Any, times: Times) -> bool:
        """Whether the next denoiser call, at this timestep, runs both passes."""
        scale = self.guidance_scale()
        guided = isinstance(scale, torch.Tensor) or scale > 1
        return guided and self._calls in self._refreshes(timestep, self._calls, times)

    def _refreshes(self, timestep: Any, number: int, times: Times) -> tuple[int, ...]:
        """The denoiser calls that run both passes. Their number is known at the first one: image
        to image begins inside the schedule."""
        if self._places is None:
            schedule = self.timesteps()
            steps = 0
            if schedule is not None and len(schedule):
                timestep = torch.as_tensor(timestep, device=schedule.device).reshape(-1)[:1]
                first = self._step_in(timestep, schedule)
                if first is None:  # not the timestep itself: the nearest one of the schedule
                    there = times.schedule_time(schedule)
                    first = int((there - times.time(timestep)).abs().argmin())
                steps = number + len(schedule) - first
            self._places = self.refresh_at(steps)
        return self._places

    def _step_in(self, timestep: torch.Tensor, schedule: torch.Tensor) -> int | None:
        """Which step of a schedule a timestep is; None where it is not known."""
        found = step_of(timestep, schedule)
        return self.step() if found is None else found

    def corrected(
        self, name: str, entered: torch.Tensor, made: torch.Tensor,
        degraded: torch.Tensor | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Inside a call with both passes, the output of the last module with what the guide adds to
        CFG itself, because each of its steps is longer than one of CFG. None where it adds nothing.

        Args:
            entered: (2 N, features, h, w) the input of the module, negative prompts first; with
                AutoGuidance (N, ...), as the others.
            made: (2 N, C, h, w) its output, the predictions.
            degraded: (N, C, h, w) see :attr:`degraded`.

        Returns:
            (2 N, C, h, w), the last N of which are the guided prediction.
        """
        if not self.guide.corrects_refresh:
            return None
        assert self._began is not None
        unconditional, conditional = self.pair(made, degraded)
        second = self.guidance.second(unconditional, conditional, degraded)
        self._found(second, conditional)
        output = self.guide(replace(self._began[1], refresh=self.refresh))
        n = len(conditional)
        guided = output.residuals[name](self.to_guide(entered[-n:]), self.to_guide(conditional))
        return torch.cat([made[:-n], self.to_denoiser(guided)])

    def pair(
        self, made: torch.Tensor, degraded: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two predictions of a call with both passes, (N, ...) each. With AutoGuidance the
        denoiser ran on N rows, and the first is that of the weaker one.

        Args:
            made: of the denoiser.
            degraded: of the weaker one. Left out: :attr:`degraded`.
        """
        if self.guidance.replaces_second:
            worse = self.degraded if degraded is None else degraded
            assert worse is not None
            return worse, made
        unconditional, conditional = made.chunk(2)
        return unconditional, conditional

    def _found(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> None:
        assert self._began is not None
        inputs = self._began[1]
        assert inputs.refresh is not None
        maps = (conditional - unconditional, conditional, inputs.latents)
        difference, conditional, latents = (self.to_guide(x).contiguous() for x in maps)
        self.refresh = new_refresh(difference, conditional, latents, inputs.time, inputs.refresh)
        self.refreshing = False

    def refreshed(
        self, unconditional: torch.Tensor, conditional: torch.Tensor
    ) -> float | torch.Tensor | None:
        """A denoiser call with both passes is done.

        Args:
            unconditional: (N, C, h, w) its prediction for the negative prompts, on the grid of
                :class:`GuideInputs`.
            conditional: (N, C, h, w) that for the prompts.

        Returns:
            The guidance scale with which the two are combined; None where the second is guided
            already.
        """
        assert self._began is not None
        scale = None
        if self.refreshing:
            scale = self._began[0]
            self._found(unconditional, conditional)
        self.doubled, self._began, self.degraded = False, None, None
        return scale

    def end(self, prediction: torch.Tensor) -> None:
        """The denoiser call is done.

        Raises:
            GuideError: the denoiser went past a layer to which the guide adds; or at a scale
                outside its training the guide led to values that are not finite, or soon will not
                be.
        """
        if self._due:
            names = (*self.output.gains, *self.output.residuals)  # in running order
            first = next(name for name in names if name in self._due)
            raise GuideError(
                f"the denoiser went past {first}, to which the guide adds; undo what skips or "
                "replaces its layers"
            )
        if self._untrained is not None and not prediction.abs().max() <= LARGEST:
            low, high = self.guide.guidance_scale_range
            raise GuideError(
                f"guidance_scale {self._untrained:g} is too far from [{low:g}, {high:g}], where "
                "this guide was trained: the prediction overflows"
            )

    def extrapolated_text(
        self, text: torch.Tensor, negative: TextConditions | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """``c + g (c - n)`` of the embeddings of the running call.

        Args:
            text: (N, L, D) the embeddings c.
            negative: n, where the denoiser has changed both on the way. Left out: as given.
            mask: (N, L) of the embeddings, where it is another than in the call.
        """
        output, call = self.output, self.call
        if output.text_gain is not None:
            assert call is not None
            conditions = TextConditions(text, mask=call.text.mask if mask is None else mask)
            against = self.negative if negative is None else negative
            difference = self.cache.made_of(text, lambda: conditions.minus(against))
            text = self.to_denoiser(torch.addcmul(self.to_guide(text), output.text_gain,
                                                  self.to_guide(difference)))  # fmt: skip
        return text

    def added_text(self, text: torch.Tensor) -> torch.Tensor:
        """The embeddings of the running call, (N, L, D), with the guide's own addition."""
        added = self.output.text
        return text if added is None else self.to_denoiser(text + added)

    def residual(self, name: str, entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """The output of a module (N, channels, h, w) with the guide's residual."""
        function = self.output.residuals.get(name)
        if function is None:
            return made
        self._due.discard(name)
        return self.to_denoiser(function(self.to_guide(entered), self.to_guide(made)))

    def extrapolates(self, name: str) -> bool:
        """Whether the guide extrapolates a layer in the running call."""
        return name in self.output.gains

    def extrapolate(
        self, name: str, output: torch.Tensor, negative: torch.Tensor, by_head: bool = False
    ) -> torch.Tensor:
        """``a + g (a - a_n)`` of a layer.

        Args:
            output: a, (N, channels), or by heads (N, tokens, heads, width).
            negative: a_n, of the same shape.
        """
        self._due.discard(name)
        weight = self._weights.get(name)
        if weight is not None:  # one operator in place of two
            weight = weight[:, None, :, None] if by_head else weight
            # under autocast not all of them have one precision
            return torch.lerp(output, negative.to(output.dtype), weight.to(output.dtype))
        gain = self.output.gains[name]
        gain = gain[:, None, :, None] if by_head else gain
        return self.to_denoiser(torch.addcmul(output, gain, output - negative))

    def to_guide(self, x: Any) -> Any:
        """A tensor or texts in the guide's precision."""
        return x if self._denoiser_dtype is None else x.to(self.guide.dtype)

    def to_denoiser(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor in the denoiser's precision."""
        return x if self._denoiser_dtype is None else x.to(self._denoiser_dtype)

    def _scheduled(
        self, call: DenoiserCall, number: int, scale: float | torch.Tensor, times: Times
    ) -> tuple[GuideInputs, Any]:
        """The guide's inputs, and its modulations at this step from those of all steps until the
        next refresh; None where the step is not part of a known schedule."""
        n, device = len(call.latents), call.latents.device
        timestep = torch.as_tensor(call.timestep, device=device)
        plain = not isinstance(scale, torch.Tensor) and not torch.is_grad_enabled()
        schedule = self.timesteps() if plain else None
        place = None if schedule is None else self._step_in(timestep, schedule)
        table = self.cache.find_table(
            schedule, place, scale, call.text, n, times.schedule_time, device
        )  # fmt: skip
        if table is None:
            w = torch.as_tensor(scale, dtype=torch.float32, device=device).expand(n)
            return self._inputs(call, times.time(timestep).reshape(-1).expand(n), w), None
        place = table.place
        inputs = self._inputs(call, table.times[place].expand(n), table.w)
        found = table.modulations_at_step(self.refresh)
        if found is None:
            following = [i for i in self._places or () if i > number]
            # without refreshes for the whole schedule: a part of it rounds otherwise
            first = place if following or self.refresh is not None else 0
            last = place + following[0] - number if following else len(table.times)
            size = sum(p.nbytes for p in self.guide.parameters()) * (last - first) * n
            if size > TABLE_BYTES:
                return inputs, None
            made = self.guide.modulations(
                table.times[first:last].expand(-1, n), table.w[None, :1], inputs.text,
                inputs.negative, self.refresh,
            )  # fmt: skip
            table.modulations = None if made is None else made.unbind()
            table.first, table.refresh = first, self.refresh
            found = table.modulations_at_step(self.refresh)
        return inputs, found

    def _inputs(self, call: DenoiserCall, time: torch.Tensor, w: torch.Tensor) -> GuideInputs:
        return GuideInputs(
            self.to_guide(call.latents), time, w, self.to_guide(call.text),
            self.to_guide(self.negative),
            {k: self.to_guide(v) for k, v in call.added_cond_kwargs.items()}, self.refresh,
        )  # fmt: skip


@contextmanager
def current_pass(guided: GuidedPass | None) -> Iterator[None]:
    """This one, or none, is the current one inside the block, as it stands: for code that runs
    once more, or in another thread."""
    before, _HERE.open = _HERE.open, guided
    try:
        yield
    finally:
        _HERE.open = before
