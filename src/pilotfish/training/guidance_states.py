"""Stage 1's training states: where the noisy latents come from on which a guide learns (1).

Equation (1) is linear in the two predictions, so a state that is kept with both of them
can be trained on many times, each time with another w, at the price of the student's
pass alone. All three sources therefore yield latents and timesteps with the teacher's two
predictions.

- ``noised``: noised latents of real pictures, the paper's.
- ``trajectory``: a pool of latents that are being sampled by the teacher's own CFG; each
  stands at its own timestep, prompt and scale. Prompts alone are needed.
- ``student``: the same pool, with a share of its latents stepped by the student's own
  prediction, so that it also meets the states that it will lead itself into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from pilotfish.guidance import classifier_free_guidance, draw_guidance_scales
from pilotfish.noise import NoisePath
from pilotfish.training.pool import Pool, draw_negatives
from pilotfish.training.rolling import Rolling
from pilotfish.training.states import Guided, States, TwoPasses


@dataclass(frozen=True)
class GuidanceStates(States):
    """States with the teacher's two predictions.

    Attributes:
        unconditional: (N, C, h, w) the base's prediction for the null prompt.
        conditional: (N, C, h, w) the base's prediction for the prompt.
    """

    any_scale: ClassVar[bool] = True

    unconditional: torch.Tensor
    conditional: torch.Tensor

    def target(self, guidance_scale: torch.Tensor) -> torch.Tensor:
        """The teacher's answer at any scale, equation (1)."""
        return classifier_free_guidance(self.unconditional, self.conditional, guidance_scale)

    @property
    def untrained(self) -> torch.Tensor:
        """A fresh guide adds nothing to the conditional prediction."""
        return self.conditional


class NoisedPictures:
    """Noised latents of real pictures: ``z_t = sqrt(a_t) x + sqrt(1 - a_t) eps``, t uniform.

    Args:
        latents: (M, C, h, w) clean latents.
        prompt: (M,) the prompt index of each.
        prompts: how many there are.
        negative_share: as of a :class:`~pilotfish.training.pool.Pool`.
    """

    kind = GuidanceStates

    def __init__(
        self, teacher: TwoPasses, schedule: NoisePath, latents: torch.Tensor, prompt: torch.Tensor,
        scales: tuple[float, float], prompts: int, negative_share: float = 0.0,
    ) -> None:  # fmt: skip
        self.teacher, self.schedule, self.scales = teacher, schedule, scales
        self.latents, self.prompt = latents, prompt
        self.prompts, self.negative_share = prompts, negative_share

    def draw(self, n: int, generator: torch.Generator) -> GuidanceStates:
        pick = torch.randint(len(self.latents), (n,), generator=generator)
        t = torch.randint(len(self.schedule.alphas_cumprod), (n,), generator=generator)
        noise = torch.randn(n, *self.latents.shape[1:], generator=generator)
        z = self.schedule.add_noise(self.latents[pick], noise, t)
        prompt = self.prompt[pick]
        scale = draw_guidance_scales(n, *self.scales, generator)
        negative = draw_negatives(n, self.prompts, self.negative_share, generator)
        said = self.teacher(z, t, prompt, negative)
        return GuidanceStates(z, t, scale, prompt, negative, *said)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


class RollingTrajectories(Rolling):
    """A pool of latents that are being sampled by CFG; a drawn one takes one DDIM step.

    Args:
        teacher: the base's two passes.
        pool: the latents.
        student: if given, steps those of the pool that are its own.
    """

    kind = GuidanceStates

    def __init__(
        self, teacher: TwoPasses, schedule: NoisePath, pool: Pool, student: Guided | None = None
    ) -> None:
        super().__init__(schedule, pool, student)
        self.teacher = teacher

    def teach(self, slots: torch.Tensor) -> tuple[GuidanceStates, torch.Tensor]:
        pool = self.pool
        z, t, scale = pool.latents[slots], pool.timestep(slots), pool.scale[slots]
        prompt, negative = pool.prompt[slots], pool.negative[slots]
        said = self.teacher(z, t, prompt, negative)
        states = GuidanceStates(z, t, scale, prompt, negative, *said)
        return states, states.target(scale)
