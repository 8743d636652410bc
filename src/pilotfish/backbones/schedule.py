"""What a guided pass computes for many steps of a schedule at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from pilotfish.interface import Refresh, TextConditions


@dataclass
class ScheduleTable:
    """Values at every step of a schedule, and what they were made of.

    Attributes:
        schedule: (T,) timesteps.
        scale: w.
        text: the prompts.
        n: their number.
        times: (T, 1) normalised times.
        w: (N,) the scale.
        values: what the denoiser's own layers make of time and negative prompt, by its key: one
            tensor for each step.
        modulations: the guide's, from step ``first`` on; None where they are computed at each step.
        refresh: the one that they were made with.
    """

    schedule: torch.Tensor
    scale: float
    text: TextConditions
    n: int
    times: torch.Tensor
    w: torch.Tensor
    values: dict[Any, Any] = field(default_factory=dict)
    modulations: list[Any] | None = None
    first: int = 0
    refresh: Refresh | None = None

    def holds(self, schedule: torch.Tensor, scale: float, text: TextConditions, n: int) -> bool:
        """Whether it was made of these."""
        same = schedule is self.schedule and scale == self.scale and n == self.n
        mine = self.text
        return same and all(
            getattr(text, name) is getattr(mine, name) for name in ("embeds", "pooled", "mask")
        )

    def modulations_at(self, step: int, refresh: Refresh | None) -> Any:
        """Those of a step; None where they were made of another refresh, or not for this step."""
        if self.modulations is None or refresh is not self.refresh:
            return None
        place = step - self.first
        return self.modulations[place] if 0 <= place < len(self.modulations) else None


def step_of(timestep: torch.Tensor, schedule: torch.Tensor) -> int | None:
    """Which step of a schedule a timestep is: pipelines hand out views into the schedule's own
    memory, so a view's offset tells without waiting for the device. None for any other tensor."""
    if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    place = int(timestep.storage_offset() - schedule.storage_offset())
    single = timestep.numel() == 1 or set(timestep.stride()) == {0}
    dense = schedule.stride() == (1,) and schedule.dtype == timestep.dtype
    return place if single and dense and 0 <= place < len(schedule) else None
