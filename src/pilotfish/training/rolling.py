"""States from latents that are being sampled, by a teacher or by the student itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pilotfish.noise import NoisePath
from pilotfish.training.pool import Pool
from pilotfish.training.states import Guided, States


class Rolling:
    """A pool of latents on their way; a drawn one takes one step and goes back.

    Args:
        pool: the latents.
        student: if given, steps those of the pool that are its own.
    """

    kind: type[States]

    def __init__(self, schedule: NoisePath, pool: Pool, student: Guided | None = None) -> None:
        self.schedule, self.pool, self.student = schedule, pool, student

    def teach(self, slots: torch.Tensor) -> tuple[States, torch.Tensor]:
        """What the teacher says of the latents in ``slots``: the states, and the prediction
        that steps them."""
        raise NotImplementedError

    def draw(self, n: int, generator: torch.Generator) -> States:
        """``n`` states; their latents have taken a step."""
        slots = self.pool.take(n, generator)
        states, prediction = self.teach(slots)
        own = self.pool.own[slots]
        if self.student is not None and own.any():
            part = states.pick(own)
            prediction = prediction.clone()
            prediction[own] = self.student(
                part.latents, part.timestep, part.prompt, part.negative, part.guidance_scale
            )
        to = self.pool.timestep(slots, ahead=1)
        stepped = self.schedule.ddim_step(states.latents, prediction, states.timestep, to)
        self.pool.put_back(slots, stepped, generator)
        return states

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be saved."""
        return self.pool.tensors()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put it back."""
        self.pool.load(tensors)
