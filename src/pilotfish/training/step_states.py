"""Stage 2's training states: one step that must lead where two of the teacher lead.

The states lie on the sampling grid of the student's number of steps. From each the teacher, a
guided pass as well, takes two DDIM steps on the grid that is twice as fine; the student must
reach the same latents in one (Salimans & Ho, arXiv 2202.00512).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pilotfish.noise import NoisePath
from pilotfish.training.pool import Pool
from pilotfish.training.rolling import Rolling
from pilotfish.training.states import Guided, States


@dataclass(frozen=True)
class StepStates(States):
    """States with the prediction that leads in one step where the teacher goes in two.

    Attributes:
        goal: (N, C, h, w) that prediction.
        first: (N, C, h, w) the teacher's own, from which the student starts.
    """

    goal: torch.Tensor
    first: torch.Tensor

    def target(self, guidance_scale: torch.Tensor) -> torch.Tensor:
        """The goal, known at the scale of the state alone."""
        return self.goal

    @property
    def untrained(self) -> torch.Tensor:
        """A student that starts from its teacher predicts what the teacher does."""
        return self.first


class HalvedTrajectories(Rolling):
    """A pool of latents on the student's grid; a drawn one takes one of its steps.

    Args:
        teacher: its guided prediction.
        pool: the latents, all of the same number of steps.
        student: if given, steps those of the pool that are its own.
    """

    kind = StepStates

    def __init__(
        self, teacher: Guided, schedule: NoisePath, pool: Pool, student: Guided | None = None
    ) -> None:
        super().__init__(schedule, pool, student)
        self.teacher = teacher

    def teach(self, slots: torch.Tensor) -> tuple[StepStates, torch.Tensor]:
        pool, step = self.pool, self.schedule.ddim_step
        z, scale = pool.latents[slots], pool.scale[slots]
        prompt, negative = pool.prompt[slots], pool.negative[slots]
        t, between = pool.timestep(slots), pool.timestep(slots, ahead=1, finer=2)
        to = pool.timestep(slots, ahead=1)
        first = self.teacher(z, t, prompt, negative, scale)
        halfway = step(z, first, t, between)
        second = self.teacher(halfway, between, prompt, negative, scale)
        goal = step(halfway, second, between, to)
        prediction = self.schedule.prediction_between(z, goal, t, to)
        return StepStates(z, t, scale, prompt, negative, prediction, first), prediction
