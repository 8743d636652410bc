"""Refreshing the guidance: some steps of a call run both passes.

After such a step the guide is given the difference between the two predictions, which changes
slowly along a trajectory, and its age; after two, how fast it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pilotfish.guidance import per_sample
from pilotfish.interface import GuideError, Refresh

RefreshSteps = int | float | Sequence[int]
"""How many steps of a call run both passes; or what ratio of them, a float between 0 and 1; or
which, counted from 0."""


DENSER = 1.5
"""The power of :func:`inside` for guides that were not distilled to few steps."""


def inside(count: int, steps: int, power: float = 1.0) -> tuple[int, ...]:
    """The steps ``steps * ((i + 1) / (count + 1))^power``, rounded down, none of them twice; all
    steps where there are fewer.

    Args:
        power: at least 1: evenly spaced, with as many steps before the first as between two. Above
            it the first comes sooner and the steps lie denser at high noise.
    """
    if count >= steps:
        return tuple(range(steps))
    found: list[int] = []
    for i in range(count):
        # 49 * (1 / 49) is a little less than 1
        wanted = int(steps * ((i + 1) / (count + 1)) ** power + 1e-9)
        found.append(max(wanted, found[-1] + 1 if found else 0))
    return tuple(found)


def refresh_steps(count: int, steps: int, *, few_steps: bool = False) -> tuple[int, ...]:
    """The steps that run both passes, :func:`inside` the call.

    What the first step finds says little of the next ones: the difference between the two
    predictions changes fastest there. But a guide alone is furthest from CFG in the first steps on
    a fine-tune unlike those of its training and with a negative prompt, so the first refresh is not
    late, and the steps lie denser at high noise; not so with a guide for few steps, which are long.

    Args:
        count: how many, at least 0; all where there are fewer steps.
        steps: denoiser calls of the pipeline's call, at least 1.
        few_steps: whether the guide was distilled to few steps.
    """
    return inside(count, steps, 1.0 if few_steps else DENSER)


def new_refresh(
    difference: torch.Tensor, conditional: torch.Tensor, latents: torch.Tensor, time: torch.Tensor,
    before: Refresh,
) -> Refresh:  # fmt: skip
    """What a refresh found.

    The slope is ``(d - d_before) / (t - t_before)``, by how much the difference between the two
    predictions changes per unit of normalised time. It is 0 where there was no refresh before.
    Where that was at the same time (some solvers call the denoiser twice there) its slope stays.

    Args:
        difference: (N, C, h, w) the conditional prediction minus the unconditional one.
        conditional: (N, C, h, w) the conditional prediction.
        latents: (N, C, h, w) those of the step.
        time: (N,) normalised time of the step.
        before: what the refresh before found.
    """
    elapsed = time - before.time
    same = elapsed == 0
    rate = (before.known / torch.where(same, torch.inf, elapsed)).to(difference.dtype)
    slope = (difference - before.difference) * per_sample(rate, difference)
    slope = torch.where(per_sample(same, difference) > 0, before.slope, slope)
    gap = torch.where(same, before.gap, before.known * elapsed.abs())
    return Refresh(time, difference, conditional, latents, slope, gap, torch.ones_like(time))


def check_refresh(refresh: RefreshSteps) -> RefreshSteps:
    """The argument ``refresh`` as given, a sequence as a tuple.

    Raises:
        GuideError: none of those.
    """
    if _is_count(refresh) or (isinstance(refresh, float) and 0 <= refresh <= 1):
        return refresh
    if isinstance(refresh, Sequence) and all(map(_is_count, refresh)):
        return tuple(sorted({int(i) for i in refresh}))
    raise GuideError(
        "refresh must be a number of steps, at least 0, a ratio of them between 0.0 and 1.0, or a "
        f"list of steps counted from 0, not {refresh!r}"
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def places(refresh: RefreshSteps, steps: int, *, few_steps: bool = False) -> tuple[int, ...]:
    """The steps that a value of ``refresh`` means, in a call of so many; see
    :func:`refresh_steps`."""
    if isinstance(refresh, float):
        return refresh_steps(int(refresh * steps + 0.5), steps, few_steps=few_steps)
    if isinstance(refresh, int):
        return refresh_steps(refresh, steps, few_steps=few_steps)
    return tuple(sorted(i for i in refresh if i < steps))
