"""Training states: where the noisy latents come from on which a guide learns.

Equation (1) is linear in the two predictions, so a state that is kept with both of them
can be trained on many times, each time with another w, at the price of the student's
pass alone. All three sources therefore yield :class:`States`: latents and timesteps with
the teacher's two predictions, and a replay buffer stands between source and training.

- ``noised``: noised latents of real pictures, the paper's.
- ``trajectory``: a pool of latents that are being sampled by the teacher's own CFG; each
  stands at its own timestep, prompt and scale. Prompts alone are needed.
- ``student``: the same pool, with a share of its latents stepped by the student's own
  prediction, so that it also meets the states that it will lead itself into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from pilotfish.guidance import classifier_free_guidance, draw_guidance_scales
from pilotfish.schedules import Schedule, sampling_timesteps

SOURCES = ("noised", "trajectory", "student")


@dataclass(frozen=True)
class States:
    """A batch of training states.

    Attributes:
        latents: (N, C, h, w) noisy latents.
        timestep: (N,) int64.
        guidance_scale: (N,) the scale at which each was being sampled.
        prompt: (N,) int64, index into the prompts.
        unconditional: (N, C, h, w) the base's prediction for the null prompt.
        conditional: (N, C, h, w) the base's prediction for the prompt.
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    guidance_scale: torch.Tensor
    prompt: torch.Tensor
    unconditional: torch.Tensor
    conditional: torch.Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    def target(self, guidance_scale: torch.Tensor) -> torch.Tensor:
        """The teacher's answer at any scale, equation (1)."""
        return classifier_free_guidance(self.unconditional, self.conditional, guidance_scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every field by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def pick(self, index: torch.Tensor) -> States:
        """The states at ``index``."""
        return States(**{k: v[index] for k, v in self.tensors().items()})


# (latents, timestep, prompt index) -> (unconditional, conditional) predictions
Teacher = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# (latents, timestep, prompt index, guidance scale) -> the student's prediction
Student = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Source(Protocol):
    """Where states come from. Its whole memory is in ``tensors``, so that it resumes exactly."""

    def draw(self, n: int, generator: torch.Generator) -> States:
        """The next ``n`` states."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be saved."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put it back."""
        ...


class NoisedPictures:
    """Noised latents of real pictures: ``z_t = sqrt(a_t) x + sqrt(1 - a_t) eps``, t uniform.

    Args:
        latents: (M, C, h, w) clean latents.
        prompt: (M,) the prompt index of each.
    """

    def __init__(
        self, teacher: Teacher, schedule: Schedule, latents: torch.Tensor, prompt: torch.Tensor,
        scales: tuple[float, float],
    ) -> None:  # fmt: skip
        self.teacher, self.schedule, self.scales = teacher, schedule, scales
        self.latents, self.prompt = latents, prompt

    def draw(self, n: int, generator: torch.Generator) -> States:
        pick = torch.randint(len(self.latents), (n,), generator=generator)
        t = torch.randint(len(self.schedule.alphas_cumprod), (n,), generator=generator)
        noise = torch.randn(n, *self.latents.shape[1:], generator=generator)
        z = self.schedule.add_noise(self.latents[pick], noise, t)
        prompt = self.prompt[pick]
        scale = draw_guidance_scales(n, *self.scales, generator)
        return States(z, t, scale, prompt, *self.teacher(z, t, prompt))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


class RollingTrajectories:
    """A pool of latents that are being sampled; a drawn one takes one DDIM step and goes back.

    Args:
        prompts: how many prompts there are to choose from.
        shape: (C, h, w) of the latents.
        pool: how many latents are on their way at once.
        steps: (fewest, most) sampling steps of a trajectory, drawn for each.
        student: if given, steps a share ``student_share`` of the latents.
    """

    def __init__(
        self, teacher: Teacher, schedule: Schedule, prompts: int, shape: tuple[int, ...],
        scales: tuple[float, float], *, pool: int, steps: tuple[int, int],
        generator: torch.Generator, student: Student | None = None, student_share: float = 0.0,
    ) -> None:  # fmt: skip
        self.teacher, self.schedule, self.scales = teacher, schedule, scales
        self.prompts, self.shape, self.steps = prompts, shape, steps
        self.student, self.student_share = student, student_share
        self.latents = torch.empty(pool, *shape)
        self.position = torch.zeros(pool, dtype=torch.long)
        self.length = torch.zeros(pool, dtype=torch.long)
        self.prompt = torch.zeros(pool, dtype=torch.long)
        self.scale = torch.zeros(pool)
        self.own = torch.zeros(pool, dtype=torch.bool)
        # where lengths differ, the first trajectories may be as short as one step, so that they
        # part company soon and stand at all timesteps at once
        fixed = steps[0] == steps[1]
        self._begin(torch.arange(pool), generator, shortest=steps[0] if fixed else 1)

    def _begin(
        self, slots: torch.Tensor, generator: torch.Generator, shortest: int | None = None
    ) -> None:
        n = len(slots)
        low, high = self.steps
        low = low if shortest is None else shortest
        self.latents[slots] = torch.randn(n, *self.shape, generator=generator)
        self.position[slots] = 0
        self.length[slots] = torch.randint(low, high + 1, (n,), generator=generator)
        self.prompt[slots] = torch.randint(self.prompts, (n,), generator=generator)
        self.scale[slots] = draw_guidance_scales(n, *self.scales, generator)
        self.own[slots] = torch.rand(n, generator=generator) < self.student_share

    def _timestep(self, slots: torch.Tensor, ahead: int) -> torch.Tensor:
        total = len(self.schedule.alphas_cumprod)
        grid = {int(n): sampling_timesteps(int(n), total) for n in self.length[slots].unique()}
        pairs = zip(self.length[slots].tolist(), self.position[slots].tolist(), strict=True)
        return torch.stack([grid[n][i + ahead] for n, i in pairs])

    def draw(self, n: int, generator: torch.Generator) -> States:
        slots = torch.randperm(len(self.latents), generator=generator)[:n]
        z, prompt, scale = self.latents[slots], self.prompt[slots], self.scale[slots]
        t, to = self._timestep(slots, 0), self._timestep(slots, 1)
        unconditional, conditional = self.teacher(z, t, prompt)
        states = States(z, t, scale, prompt, unconditional, conditional)
        prediction = states.target(scale)
        own = self.own[slots]
        if self.student is not None and own.any():
            prediction[own] = self.student(z[own], t[own], prompt[own], scale[own])
        self.latents[slots] = self.schedule.ddim_step(z, prediction, t, to)
        self.position[slots] += 1
        self._begin(slots[self.position[slots] >= self.length[slots]], generator)
        return states

    _KEPT = ("latents", "position", "length", "prompt", "scale", "own")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self._KEPT}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name in self._KEPT:
            getattr(self, name).copy_(tensors[name])


class Replay:
    """A ring of recent states, so that each pair of teacher passes serves many updates.

    Args:
        source: where new states come from.
        capacity: states kept.
        reuse: how many times a state is trained on, on average, while it is kept.
    """

    def __init__(self, source: Source, capacity: int, reuse: int) -> None:
        self.source, self.capacity, self.reuse = source, capacity, reuse
        self.states: States | None = None
        self.written = 0

    def draw(self, n: int, step: int, generator: torch.Generator) -> States:
        """``n`` states for training step ``step``; new ones are made every ``reuse`` steps.

        The ring is filled before the first step, so that trajectories have spread over
        all timesteps by then.
        """
        while self.states is None or len(self.states) + n <= self.capacity:
            self._write(self.source.draw(n, generator))
        if step % self.reuse == 0:
            self._write(self.source.draw(n, generator))
        return self.states.pick(torch.randint(len(self.states), (n,), generator=generator))

    def _write(self, new: States) -> None:
        # one memory layout for all: a state read back from a checkpoint must meet the same
        # kernels, which round differently for other strides
        new = States(**{k: v.contiguous() for k, v in new.tensors().items()})
        if self.states is None or len(self.states) + len(new) <= self.capacity:
            old = self.states
            joined = {k: v if old is None else torch.cat([getattr(old, k), v])
                      for k, v in new.tensors().items()}  # fmt: skip
            self.states = States(**joined)
        else:
            where = (self.written + torch.arange(len(new))) % len(self.states)
            for name, value in new.tensors().items():
                getattr(self.states, name)[where] = value
        self.written += len(new)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Source and ring, for a checkpoint."""
        kept = {f"source.{k}": v for k, v in self.source.tensors().items()}
        if self.states is not None:
            kept |= {f"ring.{k}": v for k, v in self.states.tensors().items()}
        return kept | {"written": torch.tensor(self.written)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""
        self.source.load({k[7:]: v for k, v in tensors.items() if k.startswith("source.")})
        ring = {k[5:]: v.clone() for k, v in tensors.items() if k.startswith("ring.")}
        self.states = States(**ring) if ring else None
        self.written = int(tensors["written"])
