"""A pool of latents that are being sampled, each at its own time, prompt and scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch

from pilotfish.conditioning import NULL
from pilotfish.guidance import draw_guidance_scales
from pilotfish.interface import Refresh
from pilotfish.noise import NoisePath
from pilotfish.refresh import new_refresh
from pilotfish.training.config import ConfigError
from pilotfish.training.samples import REFRESH_FIELDS, Tensors

REFRESHES = 1 / 3
"""Largest share of a training trajectory's steps that run both passes, on average; it is larger
where steps are few. Each trajectory draws its own number up to this."""


class Pool:
    """Latents on their way from noise to images; a finished one starts again from noise.

    Args:
        prompts: number of prompts to choose from.
        shape: (C, h, w) of the latents.
        scales: (low, high) of w, drawn for each trajectory.
        size: number of latents.
        steps: (fewest, most) sampling steps, drawn for each trajectory.
        path: the noise path, which has the grids.
        on_policy_ratio: ratio of the trajectories that the student samples.
        negative_prompt_prob: probability of another prompt as negative prompt.
        refresh_prob: probability that a trajectory has refreshes, which lie at random steps.
        first_step_refresh_prob: probability that the first of them is the first step.
    """

    def __init__(
        self, prompts: int, shape: tuple[int, ...], scales: tuple[float, float], *, size: int,
        steps: tuple[int, int], path: NoisePath, generator: torch.Generator,
        on_policy_ratio: float = 0.0, negative_prompt_prob: float = 0.0, refresh_prob: float = 0.0,
        first_step_refresh_prob: float = 0.0,
    ) -> None:  # fmt: skip
        self.prompts, self.shape, self.scales, self.steps = prompts, shape, scales, steps
        self.path = path
        self.grids: dict[int, torch.Tensor] = {}
        self.on_policy_ratio, self.negative_prompt_prob = on_policy_ratio, negative_prompt_prob
        self.refresh_prob = refresh_prob
        self.first_step_refresh_prob = first_step_refresh_prob
        self.latents = torch.empty(size, *shape)
        self.teacher_latents = torch.empty(size, *shape)
        self.position = torch.zeros(size, dtype=torch.long)
        self.length = torch.zeros(size, dtype=torch.long)
        self.prompt = torch.zeros(size, dtype=torch.long)
        self.negative = torch.full((size,), NULL)
        self.scale = torch.zeros(size)
        self.on_policy = torch.zeros(size, dtype=torch.bool)
        self.gap = torch.zeros(size, dtype=torch.long)
        self.due = torch.zeros(size, dtype=torch.long)
        nothing = Refresh.unknown(self.latents, self.scale)
        self.last_refresh = {
            name: getattr(nothing, f.name)
            for name, f in zip(REFRESH_FIELDS, fields(nothing), strict=True)
        }
        # where lengths differ, the first trajectories may have a single step, so that the pool soon
        # covers all timesteps
        fixed = steps[0] == steps[1]
        self._start(torch.arange(size), generator, shortest=steps[0] if fixed else 1)

    def _start(
        self, slots: torch.Tensor, generator: torch.Generator, shortest: int | None = None
    ) -> None:
        n = len(slots)
        low, high = self.steps
        low = low if shortest is None else shortest
        self.latents[slots] = torch.randn(n, *self.shape, generator=generator)
        self.teacher_latents[slots] = self.latents[slots]
        self.position[slots] = 0
        self.length[slots] = torch.randint(low, high + 1, (n,), generator=generator)
        self.prompt[slots] = torch.randint(self.prompts, (n,), generator=generator)
        self.scale[slots] = draw_guidance_scales(n, *self.scales, generator)
        self.on_policy[slots] = torch.rand(n, generator=generator) < self.on_policy_ratio
        self.negative[slots] = draw_negatives(n, self.prompts, self.negative_prompt_prob, generator)
        if self.refresh_prob:
            most = (REFRESHES * self.length[slots]).round().clamp(min=1)
            count = 1 + (most * torch.rand(n, generator=generator)).floor()
            some = torch.rand(n, generator=generator) < self.refresh_prob
            gap = (self.length[slots] / (count + 1)).round().long().clamp(min=1)
            self.gap[slots] = torch.where(some, gap, 0)
            self._set_due(slots, generator, first=0)
            if self.first_step_refresh_prob:
                at_start = torch.rand(n, generator=generator) < self.first_step_refresh_prob
                self.due[slots[some & at_start]] = 0
            for kept in self.last_refresh.values():
                kept[slots] = 0

    def _set_due(self, slots: torch.Tensor, generator: torch.Generator, first: int) -> None:
        """Draw the next refresh: ``first`` to ``first + 2 gap - 1`` steps ahead; never where the
        gap is 0."""
        gap = self.gap[slots]
        drawn = (2 * gap * torch.rand(len(slots), generator=generator)).long()
        ahead = self.position[slots] + first + drawn
        self.due[slots] = torch.where(gap > 0, ahead, torch.iinfo(torch.long).max)

    def is_due(self, slots: torch.Tensor) -> torch.Tensor:
        """(n,) whether the present step is a refresh."""
        due: torch.Tensor = self.position[slots] == self.due[slots]
        return due if self.refresh_prob else torch.zeros_like(due)

    def refresh(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last refresh of each, as fields of a :class:`TrainingSamples`."""
        return {name: kept[slots] for name, kept in self.last_refresh.items()}

    def keep_refresh(
        self, slots: torch.Tensor, difference: torch.Tensor, conditional: torch.Tensor,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Store what a refresh found, before :meth:`advance`."""
        before = Refresh(*self.refresh(slots).values())
        time, latents = self.time(slots), self.latents[slots]
        found = new_refresh(difference, conditional, latents, time, before)
        for kept, field in zip(self.last_refresh.values(), fields(found), strict=True):
            kept[slots] = getattr(found, field.name)
        self._set_due(slots, generator, first=1)

    def choose(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(n,) different slots, or all where there are fewer."""
        return torch.randperm(len(self.latents), generator=generator)[:n]

    def time(self, slots: torch.Tensor, ahead: int = 0, finer: int = 1) -> torch.Tensor:
        """The time of latents on the grid of their trajectory, or ``ahead`` steps further on a grid
        that is ``finer`` times as fine."""
        # a point on both grids is that of the coarse one: their rounding may differ
        whole, rest = divmod(ahead, finer)
        lengths = self.length[slots].tolist()
        times = 1 if rest == 0 else finer
        places = zip(lengths, self.position[slots].tolist(), strict=True)
        return torch.stack([self._grid(times * n)[times * (i + whole) + rest] for n, i in places])

    def _grid(self, steps: int) -> torch.Tensor:
        if steps not in self.grids:
            self.grids[steps] = self.path.grid(steps)
        return self.grids[steps]

    def advance(
        self, slots: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Store latents after one step."""
        self.latents[slots] = latents
        self.position[slots] += 1
        self._start(slots[self.position[slots] >= self.length[slots]], generator)

    _SAVED = (
        "latents", "teacher_latents", "position", "length", "prompt", "negative", "scale",
        "on_policy", "gap", "due",
    )  # fmt: skip

    def tensors(self) -> Tensors:
        """The state to save."""
        return {name: getattr(self, name) for name in self._SAVED} | self.last_refresh

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore it.

        Raises:
            ConfigError: the saved pool has another size.
        """
        found, size = len(tensors["latents"]), len(self.latents)
        if found != size:
            raise ConfigError(
                f"the pool has {found} latents in the checkpoint, {size} in the configuration; "
                "resume with the same --pool, and with --train_finetunes the same batch and streams"
            )
        for name, own in self.tensors().items():
            own.copy_(tensors[name])


def draw_negatives(n: int, prompts: int, prob: float, generator: torch.Generator) -> torch.Tensor:
    """(n,) indices of negative prompts: any prompt with probability ``prob``, else null."""
    negative = torch.full((n,), NULL)
    if prob:
        drawn = torch.randint(prompts, (n,), generator=generator)
        negative = torch.where(torch.rand(n, generator=generator) < prob, drawn, negative)
    return negative
