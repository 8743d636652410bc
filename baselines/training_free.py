"""Methods without training: both passes of CFG in some of the steps only.

A step without the second pass costs one. The methods differ in the steps that run both, and in
what takes the place of the unconditional prediction in the others:

- :class:`GuidanceInterval` (Kynkäänniemi et al., arXiv 2404.07724): both inside an interval of
  noise levels, no guidance outside. Guidance at high noise reduces diversity, and at low noise it
  has no effect.
- :class:`AdaptiveGuidance` (Castillo et al., arXiv 2312.12487): both before the two predictions
  agree, ``cos(eps(c), eps(n)) > threshold``, no guidance after.
- :mod:`baselines.reuse`: the last difference of the two predictions is used again.
- :mod:`baselines.linear_ag`: a linear function of earlier predictions.

The pipeline runs as it does with CFG, both passes in one call of the denoiser: Stable Diffusion
1.x, 2.x, XL and 3. Where the denoiser is called with a doubled batch in a step
of one pass, it runs on the prompt's half. The rule returns the unconditional prediction, and
equation (1) combines the two. Equation (1) is linear, so nothing depends on whether the denoiser
predicts epsilon, v or flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from pilotfish.backbones import Backbone

FAMILIES = ("unet", "joint-dit")
"""Families whose pipelines run both passes in one call of the denoiser and combine them by equation
(1)."""
RULES: dict[str, type[Rule]] = {}
"""Every rule that has been imported, by its name; it is made without arguments."""


@dataclass(frozen=True)
class Step:
    """A denoiser call of a pipeline's call.

    Attributes:
        index: counted from 0.
        count: how many there are.
        timestep: in [0, 1000).
    """

    index: int
    count: int
    timestep: float


class Rule:
    """CFG with one pass in some of the steps. It attaches to a pipeline as a guide does.

    A subclass is registered under the ``name`` of its class statement, if it has one.
    """

    title: ClassVar[str]
    """Its name in tables and plots."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            RULES[name] = cls

    def is_guided(self, step: Step) -> bool:
        """Whether a step runs both passes."""
        raise NotImplementedError

    def reset(self) -> None:
        """Called before the first step of a call."""

    def after_both(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        """Called after a step of two passes with its predictions, (N, C, h, w) each.

        Returns:
            (N, C, h, w) the unconditional prediction of equation (1).
        """
        return unconditional

    def after_one(self, conditional: torch.Tensor) -> torch.Tensor:
        """Called after a step of one pass with its prediction, (N, C, h, w).

        Returns:
            (N, C, h, w) the unconditional prediction of equation (1); the conditional one is no
            guidance.
        """
        return conditional

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with this rule.

        Raises:
            ValueError: a pipeline of another family.
        """
        net, names = _denoiser(pipe, self.title)
        step, halved = Step(-1, 0, float("-inf")), False

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal step, halved
            given = dict(zip(names, args, strict=False)) | kwargs
            timestep = float(torch.as_tensor(given["timestep"]).reshape(-1)[0])
            step = _next(step, timestep, pipe.scheduler.timesteps)
            if step.index == 0:
                self.reset()
            halved = pipe.do_classifier_free_guidance and not self.is_guided(step)
            if not halved:
                return None
            n = len(given[names[0]])
            return (), {k: _second_half(v, n) for k, v in given.items()}

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if not pipe.do_classifier_free_guidance:
                return None
            if halved:
                conditional = output[0]
                unconditional = self.after_one(conditional)
            else:
                found, conditional = output[0].chunk(2)
                unconditional = self.after_both(found, conditional)
                if unconditional is found:
                    return None
            return (torch.cat([unconditional, conditional]), *output[1:])

        handles = [
            net.register_forward_pre_hook(before, with_kwargs=True),
            net.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield pipe
        finally:
            for handle in handles:
                handle.remove()


def _denoiser(pipe: Any, title: str) -> tuple[Any, list[str]]:
    """The denoiser, and the names of its arguments.

    Raises:
        ValueError: see :meth:`Rule.attached`.
    """
    backbone = next(iter(Backbone.all_of_pipeline(pipe).values()), None)
    if backbone is None or backbone.family not in FAMILIES:
        raise ValueError(
            f"{title} is made for Stable Diffusion 1.x, 2.x, XL and 3, and this is a "
            f"{type(pipe).__name__}"
        )
    return backbone.denoiser, list(signature(backbone.denoiser.forward).parameters)


def _next(last: Step, timestep: float, schedule: torch.Tensor) -> Step:
    """The step after ``last``, which is the first of a call where the timestep rises or is the
    schedule's first. Some schedulers run a timestep twice, but never the first one."""
    rises = timestep > last.timestep or last.index + 1 >= last.count
    if not rises and timestep != float(schedule[0]):
        return Step(last.index + 1, last.count, timestep)
    places = (schedule == timestep).nonzero()
    return Step(0, len(schedule) - (int(places[0]) if len(places) else 0), timestep)


def _second_half(value: Any, n: int) -> Any:
    """The prompt's half of every tensor that has ``n`` rows."""
    if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == n:
        return value[n // 2 :]
    if isinstance(value, list | tuple):
        return type(value)(_second_half(v, n) for v in value)
    if isinstance(value, dict):
        return {k: _second_half(v, n) for k, v in value.items()}
    return value


@dataclass
class GuidanceInterval(Rule, name="guidance-interval"):
    """CFG where ``low <= timestep < high``.

    Raises:
        ValueError: an empty interval.
    """

    title = "guidance interval"
    low: float = 200
    high: float = 800

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"no timestep lies in [{self.low:g}, {self.high:g})")

    def is_guided(self, step: Step) -> bool:
        return self.low <= step.timestep < self.high


@dataclass
class AdaptiveGuidance(Rule, name="adaptive-guidance"):
    """CFG until the two predictions agree, on average over the batch.

    Args:
        threshold: cosine in (0, 1] above which they do.

    Raises:
        ValueError: a threshold outside that range.
    """

    title = "adaptive guidance"
    threshold: float = 0.99

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"the threshold must be above 0 and at most 1, not {self.threshold:g}")
        self.agree = False

    def reset(self) -> None:
        self.agree = False

    def is_guided(self, step: Step) -> bool:
        return not self.agree

    def after_both(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        cosine = F.cosine_similarity(unconditional.flatten(1), conditional.flatten(1))
        self.agree = bool(cosine.mean() > self.threshold)
        return unconditional
