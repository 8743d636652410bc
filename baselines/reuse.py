"""Methods without training that use the last difference of the two predictions again.

``delta = eps(c) - eps(n)`` is what CFG adds, times ``w - 1``. It changes slowly from step to step.

- :class:`DeltaReuse`, the core of CFG-Cache (FasterCache, Lyu et al., arXiv 2410.19355): both
  passes at every n-th step, the last delta in between. CFG-Cache, made for video, also weights low
  and high frequencies of delta by factors of its own; here it is used as it is, or with a
  share of its slope by steps.
- :class:`CompressGuidance` (Dinh et al., arXiv 2408.11194): both passes at steps that lie denser at
  high noise. A delta stands for all the steps until the next one: either it is used in each of
  them, or, as the paper does in the end, it is added as many times at once and the others have no
  guidance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from baselines.training_free import Rule, Step

Places = Callable[[int, int], tuple[int, ...]]
"""(count, steps) -> which of the steps run both passes, rising and counted from 0."""


def every_nth(count: int, steps: int) -> tuple[int, ...]:
    """Evenly spaced from step 0; all steps where there are fewer."""
    count = min(count, steps)
    return tuple(i * steps // count for i in range(count))


def denser_early(count: int, steps: int, power: float = 2.0) -> tuple[int, ...]:
    """The steps ``steps * (i / count)^power`` of Compress Guidance. Steps that coincide are moved
    to the next one that is free, so that there are ``count``; all where there are fewer.

    Args:
        power: 1 is even, above it the steps lie denser at high noise; the paper uses 1 to 6.

    Raises:
        ValueError: a power below 1.
    """
    if power < 1:
        raise ValueError(f"the power must be at least 1, not {power:g}")
    count, found = min(count, steps), list[int]()
    for i in range(count):
        wanted = int(steps * (i / count) ** power)
        found.append(max(wanted, found[-1] + 1 if found else 0))
    return tuple(found)


@dataclass
class SpacedRule(Rule):
    """Both passes at a number of steps.

    Args:
        count: how many.
        places: which.

    Raises:
        ValueError: a negative count.
    """

    count: int = 5
    places: Places = every_nth

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"the number of second passes must be at least 0, not {self.count}")
        self.reset()

    def reset(self) -> None:
        self.at: tuple[int, ...] = ()

    def is_guided(self, step: Step) -> bool:
        self.now = step
        self.at = self.at or self.places(self.count, step.count)
        return step.index in self.at


@dataclass
class DeltaReuse(SpacedRule, name="delta-reuse"):
    """The last delta in all steps that do not run both passes; no guidance before the first.

    Args:
        slope: share that is added of what delta would have changed since, if it went on as between
            the last two of those steps; 0 is the published method.
    """

    title = "delta reuse"
    slope: float = 0.0

    def reset(self) -> None:
        super().reset()
        self.deltas: list[tuple[int, torch.Tensor]] = []

    def after_both(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        self.deltas = [*self.deltas[-1:], (self.now.index, conditional - unconditional)]
        return unconditional

    def after_one(self, conditional: torch.Tensor) -> torch.Tensor:
        if not self.deltas:
            return conditional
        at, delta = self.deltas[-1]
        if self.slope and len(self.deltas) > 1:
            before, earlier = self.deltas[0]
            delta = delta + self.slope * (self.now.index - at) / (at - before) * (delta - earlier)
        return conditional - delta


@dataclass
class CompressGuidance(SpacedRule, name="compress-guidance"):
    """The delta of each step of both passes, added at once for all the steps until the next one;
    no guidance in those. With these places, :class:`DeltaReuse` is the paper's other form."""

    title = "Compress Guidance"
    places: Places = denser_early

    def after_both(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        following = next((i for i in self.at if i > self.now.index), self.now.count)
        steps = following - self.now.index
        return conditional - steps * (conditional - unconditional) if steps > 1 else unconditional
