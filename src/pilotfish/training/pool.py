"""Latents that are being sampled, each at its own timestep, prompt and guidance scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pilotfish.conditioning import NULL
from pilotfish.guidance import draw_guidance_scales
from pilotfish.noise import sampling_timesteps
from pilotfish.training.config import ConfigError


class Pool:
    """Latents on their way from noise to pictures; a finished one starts anew from noise.

    Args:
        prompts: how many prompts there are to choose from.
        shape: (C, h, w) of the latents.
        scales: (low, high) of w, drawn for each trajectory.
        size: how many latents are on their way at once.
        steps: (fewest, most) sampling steps of a trajectory, drawn for each.
        train_timesteps: of the noise schedule.
        student_share: of the trajectories, those that the student steps itself.
        negative_share: of the trajectories, those with another prompt as negative prompt in
            place of the null prompt.
    """

    def __init__(
        self, prompts: int, shape: tuple[int, ...], scales: tuple[float, float], *, size: int,
        steps: tuple[int, int], train_timesteps: int, generator: torch.Generator,
        student_share: float = 0.0, negative_share: float = 0.0,
    ) -> None:  # fmt: skip
        self.prompts, self.shape, self.scales, self.steps = prompts, shape, scales, steps
        self.train_timesteps = train_timesteps
        self.student_share, self.negative_share = student_share, negative_share
        self.latents = torch.empty(size, *shape)
        self.position = torch.zeros(size, dtype=torch.long)
        self.length = torch.zeros(size, dtype=torch.long)
        self.prompt = torch.zeros(size, dtype=torch.long)
        self.negative = torch.full((size,), NULL)
        self.scale = torch.zeros(size)
        self.own = torch.zeros(size, dtype=torch.bool)
        # where lengths differ, the first trajectories may be as short as one step, so that they
        # part company soon and stand at all timesteps at once
        fixed = steps[0] == steps[1]
        self._begin(torch.arange(size), generator, shortest=steps[0] if fixed else 1)

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
        self.negative[slots] = draw_negatives(n, self.prompts, self.negative_share, generator)

    def take(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(n,) slots, or all of them where there are fewer, none twice."""
        return torch.randperm(len(self.latents), generator=generator)[:n]

    def timestep(self, slots: torch.Tensor, ahead: int = 0, finer: int = 1) -> torch.Tensor:
        """Where latents stand on the grid of their trajectory, or ``ahead`` steps further on a
        grid that is ``finer`` times as fine; -1 is past the last step."""
        # a point that lies on both grids is that of the coarse one: rounding may part them
        whole, rest = divmod(ahead, finer)
        lengths = self.length[slots].tolist()
        times = 1 if rest == 0 else finer
        grid = {n: sampling_timesteps(times * n, self.train_timesteps) for n in set(lengths)}
        places = zip(lengths, self.position[slots].tolist(), strict=True)
        return torch.stack([grid[n][times * (i + whole) + rest] for n, i in places])

    def put_back(
        self, slots: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Latents have taken one step."""
        self.latents[slots] = latents
        self.position[slots] += 1
        self._begin(slots[self.position[slots] >= self.length[slots]], generator)

    _KEPT = ("latents", "position", "length", "prompt", "negative", "scale", "own")

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be saved."""
        return {name: getattr(self, name) for name in self._KEPT}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put it back.

        Raises:
            ConfigError: it is of a pool of another size.
            ValueError, KeyError: it is of no pool of such latents, or some of it is missing.
        """
        found, mine = tensors["latents"], self.latents
        if found.shape[1:] == mine.shape[1:] and len(found) != len(mine):
            raise ConfigError(
                f"its pool has {len(found)} latents, this run's has {len(mine)}; resume with the "
                "same --pool, and with --practice the same batch and streams"
            )
        for name in self._KEPT:
            mine, saved = getattr(self, name), tensors[name]
            if (mine.shape, mine.dtype) != (saved.shape, saved.dtype):
                raise ValueError(
                    f"{name} of the pool is {list(saved.shape)}, this run's is {list(mine.shape)}"
                )
            mine.copy_(saved)


def draw_negatives(n: int, prompts: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """(n,) indices of negative prompts: any of the prompts in a ``share`` of them, else null."""
    negative = torch.full((n,), NULL)
    if share:
        drawn = torch.randint(prompts, (n,), generator=generator)
        negative = torch.where(torch.rand(n, generator=generator) < share, drawn, negative)
    return negative
