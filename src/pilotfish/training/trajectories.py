"""Sources of training samples: noised images, and pools of latents that are being sampled.

- Noised images are the paper's source. They need captioned images.
- A pool holds latents on CFG trajectories, each at its own timestep, prompt and scale. A drawn
  latent is stepped with the target that it gives. This needs prompts alone.
- On-policy, a ratio of the trajectories is stepped with the student's prediction instead, so that
  the student is trained on the latents that it reaches itself. With tracking it samples all of
  them, and the teacher samples from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from pilotfish.guidance import draw_guidance_scales
from pilotfish.noise import NoisePath
from pilotfish.training.pool import Pool, draw_negatives
from pilotfish.training.samples import (
    GuidanceSamples,
    StepSamples,
    Tensors,
    TrackingSamples,
    TrainingSamples,
)

# (latents, time, prompt, negative prompt, guidance scale) -> a guided prediction; texts are given
# by their index
Guided = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
# the student's prediction for some samples, at the scales of their trajectories
GuidedByStudent = Callable[[TrainingSamples], torch.Tensor]
BACK = 0.25
"""Share of the way back to the teacher's trajectory in the targets of :class:`TrackedTrajectories`
and :class:`HalvedTrajectories`: nothing would let deviations grow, the whole way would make the
target noisy."""


class TwoPasses(Protocol):
    """The base's two passes, as of :class:`~pilotfish.teacher.Teacher`."""

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The unconditional and the conditional prediction."""
        ...

    def guided(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, w: torch.Tensor | float
    ) -> torch.Tensor:
        """CFG, by the rule of the base's pipeline."""
        ...


class Trajectories:
    """A pool; drawn latents are stepped and stored again.

    Args:
        pool: the latents.
        student: steps the on-policy latents, if given.
    """

    samples_type: type[TrainingSamples]
    corrects_refresh = False
    """Whether the student's prediction differs from CFG in steps with both passes, too."""

    def __init__(self, path: NoisePath, pool: Pool, student: GuidedByStudent | None = None) -> None:
        self.path, self.pool, self.student = path, pool, student

    def teach(self, slots: torch.Tensor) -> tuple[TrainingSamples, torch.Tensor]:
        """The samples of ``slots``, and the teacher's prediction that steps them."""
        raise NotImplementedError

    def found(self, samples: TrainingSamples) -> tuple[torch.Tensor, torch.Tensor]:
        """Difference and conditional prediction, as a refresh at the samples finds them."""
        raise NotImplementedError

    def draw(self, n: int, generator: torch.Generator) -> TrainingSamples:
        """``n`` samples; their latents in the pool have advanced one step."""
        slots = self.pool.choose(n, generator)
        samples, prediction = self.teach(slots)
        due = self.pool.is_due(slots)
        own = self.pool.on_policy[slots] & (~due | self.corrects_refresh)
        if self.student is not None and own.any():
            prediction = prediction.clone()
            prediction[own] = self.student(samples.pick(own))
        if due.any():
            self.pool.keep_refresh(slots[due], *self.found(samples.pick(due)), generator)
        to = self.pool.time(slots, ahead=1)
        stepped = self.path.step(samples.latents, prediction, samples.time, to)
        self.pool.advance(slots, stepped, generator)
        return samples

    def tensors(self) -> Tensors:
        """The state to save."""
        return self.pool.tensors()

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore it."""
        self.pool.load(tensors)


class CFGTrajectories(Trajectories):
    """Stage 1: latents sampled by CFG.

    Args:
        teacher: the base's two passes.
    """

    samples_type: type[TrainingSamples] = GuidanceSamples

    def __init__(
        self,
        teacher: TwoPasses,
        path: NoisePath,
        pool: Pool,
        student: GuidedByStudent | None = None,
    ) -> None:
        super().__init__(path, pool, student)
        self.teacher = teacher

    def teach(self, slots: torch.Tensor) -> tuple[GuidanceSamples, torch.Tensor]:
        pool = self.pool
        z, t, scale = pool.latents[slots], pool.time(slots), pool.scale[slots]
        prompt, negative = pool.prompt[slots], pool.negative[slots]
        unconditional, conditional = self.teacher(z, t, prompt, negative)
        samples = GuidanceSamples(
            z, t, scale, prompt, negative, unconditional=unconditional, conditional=conditional,
            **pool.refresh(slots),
        )  # fmt: skip
        return samples, self.teacher.guided(samples.unconditional, samples.conditional, scale)

    def found(self, samples: TrainingSamples) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(samples, GuidanceSamples)
        return samples.conditional - samples.unconditional, samples.conditional


class TrackedTrajectories(CFGTrajectories):
    """Stage 1: latents sampled by the student, and by CFG from the same noise.

    The student is trained on the prediction of CFG for its own latents, and on a share of what
    would bring them back to CFG's. A guide that is trained on single steps predicts the mean of
    what it cannot know, and so guides too little; here it sees where that leads.
    """

    samples_type = TrackingSamples

    def draw(self, n: int, generator: torch.Generator) -> TrackingSamples:
        pool, step = self.pool, self.path.step
        slots = pool.choose(n, generator)
        z, own, scale = pool.teacher_latents[slots], pool.latents[slots], pool.scale[slots]
        t, to = pool.time(slots), pool.time(slots, ahead=1)
        prompt, negative = pool.prompt[slots], pool.negative[slots]
        stepped = step(z, self.teacher.guided(*self.teacher(z, t, prompt, negative), scale), t, to)
        unconditional, conditional = self.teacher(own, t, prompt, negative)
        cfg = self.teacher.guided(unconditional, conditional, scale)
        back = self.path.prediction_between(own, stepped, t, to)
        samples = TrackingSamples(
            own, t, scale, prompt, negative, unconditional=unconditional, conditional=conditional,
            goal=cfg + BACK * (back - cfg), **pool.refresh(slots),
        )  # fmt: skip
        assert self.student is not None
        due, prediction = pool.is_due(slots), self.student(samples)
        if due.any():
            prediction[due] = cfg[due]
            pool.keep_refresh(slots[due], *self.found(samples.pick(due)), generator)
        pool.teacher_latents[slots] = stepped
        pool.advance(slots, step(own, prediction, t, to), generator)
        return samples


class HalvedTrajectories(Trajectories):
    """Stage 2: latents on the student's grid. The teacher takes two steps on the grid that is
    twice as fine; the student must reach the same latents in one (Salimans & Ho, arXiv 2202.00512).

    Trajectories that the student samples are sampled by the teacher as well, from the same noise,
    and a share of what would bring the student's latents back there is added to the goal, as in
    :class:`TrackedTrajectories`.

    Args:
        teacher: its guided prediction.
        base: the base's two passes, which a refresh runs.
        pool: the latents, all with the same number of steps.
    """

    samples_type = StepSamples
    corrects_refresh = True

    def __init__(
        self, teacher: Guided, base: TwoPasses, path: NoisePath, pool: Pool,
        student: GuidedByStudent | None = None,
    ) -> None:  # fmt: skip
        super().__init__(path, pool, student)
        self.teacher, self.base = teacher, base

    def teach(self, slots: torch.Tensor) -> tuple[StepSamples, torch.Tensor]:
        pool, between = self.pool, self.path.prediction_between
        z, scale = pool.latents[slots], pool.scale[slots]
        prompt, negative = pool.prompt[slots], pool.negative[slots]
        t, to = pool.time(slots), pool.time(slots, ahead=1)
        first, end = self._two_steps(z, slots)
        goal = between(z, end, t, to)
        own = pool.on_policy[slots]
        if own.any():
            some = slots[own]
            _, reached = self._two_steps(pool.teacher_latents[some], some)
            back = between(z[own], reached, t[own], to[own])
            goal[own] += BACK * (back - goal[own])
            pool.teacher_latents[some] = reached
        samples = StepSamples(
            z, t, scale, prompt, negative, goal=goal, first=first, due=pool.is_due(slots),
            **pool.refresh(slots),
        )  # fmt: skip
        return samples, goal

    def _two_steps(
        self, latents: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's first prediction, and the latents that two of its steps reach."""
        pool, step = self.pool, self.path.step
        texts = pool.prompt[slots], pool.negative[slots], pool.scale[slots]
        t, middle = pool.time(slots), pool.time(slots, ahead=1, finer=2)
        first = self.teacher(latents, t, *texts)
        halfway = step(latents, first, t, middle)
        second = self.teacher(halfway, middle, *texts)
        return first, step(halfway, second, middle, pool.time(slots, ahead=1))

    def found(self, samples: TrainingSamples) -> tuple[torch.Tensor, torch.Tensor]:
        unconditional, conditional = self.base(
            samples.latents, samples.time, samples.prompt, samples.negative
        )
        return conditional - unconditional, conditional


class NoisedImages:
    """Noised latents of images: ``alpha x + sigma eps`` at uniform times.

    Args:
        teacher: the base's two passes.
        latents: (M, C, h, w) clean latents.
        prompt: (M,) the prompt index of each.
        scales: (low, high) of w.
        prompts: number of prompts.
        negative_prompt_prob: as of a :class:`Pool`.
    """

    samples_type: type[TrainingSamples] = GuidanceSamples

    def __init__(
        self, teacher: TwoPasses, path: NoisePath, latents: torch.Tensor, prompt: torch.Tensor,
        scales: tuple[float, float], prompts: int, negative_prompt_prob: float = 0.0,
    ) -> None:  # fmt: skip
        self.teacher, self.path, self.scales = teacher, path, scales
        self.latents, self.prompt = latents, prompt
        self.prompts, self.negative_prompt_prob = prompts, negative_prompt_prob

    def draw(self, n: int, generator: torch.Generator) -> GuidanceSamples:
        pick = torch.randint(len(self.latents), (n,), generator=generator)
        total = self.path.num_train_timesteps
        t = torch.randint(total, (n,), generator=generator) / total
        noise = torch.randn(n, *self.latents.shape[1:], generator=generator)
        z = self.path.add_noise(self.latents[pick], noise, t)
        prompt = self.prompt[pick]
        scale = draw_guidance_scales(n, *self.scales, generator)
        negative = draw_negatives(n, self.prompts, self.negative_prompt_prob, generator)
        nothing = torch.zeros_like(z)
        zero = torch.zeros(n)
        none = zero, nothing, nothing, nothing, nothing, zero, zero
        return GuidanceSamples(
            z, t, scale, prompt, negative, *none, *self.teacher(z, t, prompt, negative)
        )

    def tensors(self) -> Tensors:
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass
