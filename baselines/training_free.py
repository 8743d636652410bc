"""Methods without training: CFG in some of the steps only.

A step without guidance costs one pass. The methods differ in the steps that they guide:

- :class:`GuidanceInterval` (Kynkäänniemi et al., arXiv 2404.07724): those inside an interval of
  noise levels. Guidance at high noise reduces diversity, and at low noise it has no effect.
- :class:`AdaptiveGuidance` (Castillo et al., arXiv 2312.12487): those before the two predictions
  agree, ``cos(eps(c), eps(n)) > threshold``.

The pipeline runs as it does with CFG. Where the denoiser is called with a doubled batch in a step
that is not guided, it runs on the prompt's half, and the prediction is returned for both halves.
Equation (1) then gives the conditional prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

RULES: dict[str, type[Rule]] = {}
"""Every rule that has been imported, by its name; it is made without arguments."""


class Rule:
    """CFG in some of the steps. It attaches to a pipeline with a UNet as a guide does.

    A subclass is registered under the ``name`` of its class statement.
    """

    title: ClassVar[str]
    """Its name in tables and plots."""

    def __init_subclass__(cls, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        RULES[name] = cls

    def is_guided(self, timestep: float) -> bool:
        """Whether the step at ``timestep`` in [0, 1000) is guided."""
        raise NotImplementedError

    def reset(self) -> None:
        """Called before the first step of a call."""

    def update(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> None:
        """Called after a guided step with its two predictions, each (N, C, h, w)."""

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with this rule.

        Raises:
            ValueError: the pipeline has no UNet.
        """
        if getattr(pipe, "unet", None) is None:
            raise ValueError(
                f"{self.title} needs a pipeline with a UNet; {type(pipe).__name__} has none"
            )
        last, halved = float("-inf"), False

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal last, halved
            sample, timestep = args[0], float(torch.as_tensor(args[1]).reshape(-1)[0])
            # some schedulers run a timestep twice, but never the first one
            if timestep > last or timestep == float(pipe.scheduler.timesteps[0]):
                self.reset()
            last = timestep
            halved = pipe.do_classifier_free_guidance and not self.is_guided(timestep)
            if not halved:
                return None
            n = len(sample)
            halves = {k: _second_half(v, n) for k, v in kwargs.items()}
            return (sample[n // 2 :], *args[1:]), halves

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            prediction = output[0]
            if halved:
                return (torch.cat([prediction, prediction]), *output[1:])
            if pipe.do_classifier_free_guidance:
                self.update(*prediction.chunk(2))
            return None

        handles = [
            pipe.unet.register_forward_pre_hook(before, with_kwargs=True),
            pipe.unet.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield pipe
        finally:
            for handle in handles:
                handle.remove()


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

    def is_guided(self, timestep: float) -> bool:
        return self.low <= timestep < self.high


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

    def is_guided(self, timestep: float) -> bool:
        return not self.agree

    def update(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> None:
        cosine = F.cosine_similarity(unconditional.flatten(1), conditional.flatten(1))
        self.agree = bool(cosine.mean() > self.threshold)
