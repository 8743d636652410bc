"""Sources of training samples: noised images, and pools of latents that are being sampled.

- Noised images are the paper's source. They need captioned images.
- A pool holds latents on CFG trajectories, each at its own timestep, prompt and scale. A drawn
  latent is stepped with the target that it gives. This needs prompts alone.
- On-policy, a ratio of the trajectories is stepped with the student's prediction instead, so that
  the student is trained on the latents that it reaches itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from pilotfish.conditioning import NULL
from pilotfish.guidance import draw_guidance_scales
from pilotfish.noise import NoisePath
from pilotfish.training.config import ConfigError
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
# the student's prediction for some samples at the scales of their trajectories; whether it runs
# both passes
GuidedByStudent = Callable[[TrainingSamples, bool], torch.Tensor]
BACK = 0.25
"""Share of the way back to the teacher's trajectory in the target of :class:`TrackedTrajectories`:
nothing would let deviations grow, the whole way would make the target noisy."""
REFRESHES = 1 / 3
"""Largest share of a training trajectory's steps that run both passes, on average. Each trajectory
draws its own number up to this."""


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
    """

    def __init__(
        self, prompts: int, shape: tuple[int, ...], scales: tuple[float, float], *, size: int,
        steps: tuple[int, int], path: NoisePath, generator: torch.Generator,
        on_policy_ratio: float = 0.0, negative_prompt_prob: float = 0.0, refresh_prob: float = 0.0,
    ) -> None:  # fmt: skip
        self.prompts, self.shape, self.scales, self.steps = prompts, shape, scales, steps
        self.path = path
        self.grids: dict[int, torch.Tensor] = {}
        self.on_policy_ratio, self.negative_prompt_prob = on_policy_ratio, negative_prompt_prob
        self.refresh_prob = refresh_prob
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
        self.refresh_time, self.known = torch.zeros(size), torch.zeros(size)
        self.difference, self.refresh_conditional, self.refresh_latents = torch.zeros(
            3, size, *shape
        )  # fmt: skip
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
            for kept in self.refresh_fields():
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

    def refresh_fields(self) -> tuple[torch.Tensor, ...]:
        """Of :class:`~pilotfish.interface.Refresh`, of all latents."""
        return (
            self.refresh_time, self.difference, self.refresh_conditional, self.refresh_latents,
            self.known,
        )  # fmt: skip

    def refresh(self, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """The last refresh of each, as fields of a :class:`TrainingSamples`."""
        names = ("refresh_time", "difference", "refresh_conditional", "refresh_latents", "known")
        return {n: x[slots] for n, x in zip(names, self.refresh_fields(), strict=True)}

    def keep_refresh(
        self, slots: torch.Tensor, difference: torch.Tensor, conditional: torch.Tensor,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Store what a refresh found, before :meth:`advance`."""
        self.refresh_time[slots], self.known[slots] = self.time(slots), 1.0
        self.difference[slots], self.refresh_conditional[slots] = difference, conditional
        self.refresh_latents[slots] = self.latents[slots]
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
        "refresh_time", "known", "difference", "refresh_conditional", "refresh_latents",
    )  # fmt: skip

    def tensors(self) -> Tensors:
        """The state to save."""
        return {name: getattr(self, name) for name in self._SAVED}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore it.

        Raises:
            ConfigError: the saved pool has another size.
        """
        found, own = len(tensors["latents"]), len(self.latents)
        if found != own:
            raise ConfigError(
                f"the pool has {found} latents in the checkpoint, {own} in the configuration; "
                "resume with the same --pool, and with --train_finetunes the same batch and streams"
            )
        for name in self._SAVED:
            getattr(self, name).copy_(tensors[name])


class Trajectories:
    """A pool; drawn latents are stepped and stored again.

    Args:
        pool: the latents.
        student: steps the on-policy latents, if given.
    """

    samples_type: type[TrainingSamples]

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
        if self.student is not None:
            prediction = self._on_policy(samples, prediction, self.pool.on_policy[slots], due)
        if due.any():
            self.pool.keep_refresh(slots[due], *self.found(samples.pick(due)), generator)
        to = self.pool.time(slots, ahead=1)
        stepped = self.path.step(samples.latents, prediction, samples.time, to)
        self.pool.advance(slots, stepped, generator)
        return samples

    corrects_refresh = False
    """Whether the student's prediction differs from the teacher's in steps with both passes."""

    def _on_policy(
        self, samples: TrainingSamples, prediction: torch.Tensor, own: torch.Tensor,
        due: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The prediction with the student's in its own trajectories."""
        assert self.student is not None
        prediction = prediction.clone()
        for both in (False, True) if self.corrects_refresh else (False,):
            some = own & (due == both)
            if some.any():
                prediction[some] = self.student(samples.pick(some), both)
        return prediction

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
    """Stage 1: latents sampled by the student, beside those that CFG samples from the same noise.

    The student is trained on the prediction of CFG on its trajectory, and on a share of what would
    bring the student's latents back there. A guide that is trained on single steps predicts the
    mean of what it cannot know, and so guides too little; here it sees where that leads.
    """

    samples_type = TrackingSamples

    def draw(self, n: int, generator: torch.Generator) -> TrackingSamples:
        pool, step = self.pool, self.path.step
        slots = pool.choose(n, generator)
        z, own, scale = pool.teacher_latents[slots], pool.latents[slots], pool.scale[slots]
        t, to = pool.time(slots), pool.time(slots, ahead=1)
        prompt, negative = pool.prompt[slots], pool.negative[slots]
        unconditional, conditional = self.teacher(z, t, prompt, negative)
        cfg = self.teacher.guided(unconditional, conditional, scale)
        stepped = step(z, cfg, t, to)
        back = self.path.prediction_between(own, stepped, t, to)
        samples = TrackingSamples(
            own, t, scale, prompt, negative, unconditional=unconditional, conditional=conditional,
            goal=cfg + BACK * (back - cfg), **pool.refresh(slots),
        )  # fmt: skip
        assert self.student is not None
        due, prediction = pool.is_due(slots), self.student(samples, False)
        if due.any():
            some = samples.pick(due)
            both = self.teacher(some.latents, some.time, some.prompt, some.negative)
            prediction[due] = self.teacher.guided(*both, some.guidance_scale)
            pool.keep_refresh(slots[due], both[1] - both[0], both[1], generator)
        pool.teacher_latents[slots] = stepped
        pool.advance(slots, step(own, prediction, t, to), generator)
        return samples


class HalvedTrajectories(Trajectories):
    """Stage 2: latents on the student's grid. The teacher takes two steps on the grid that is
    twice as fine; the student must reach the same latents in one (Salimans & Ho, arXiv 2202.00512).

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
        pool, step = self.pool, self.path.step
        z, scale = pool.latents[slots], pool.scale[slots]
        prompt, negative = pool.prompt[slots], pool.negative[slots]
        t, middle = pool.time(slots), pool.time(slots, ahead=1, finer=2)
        to = pool.time(slots, ahead=1)
        first = self.teacher(z, t, prompt, negative, scale)
        halfway = step(z, first, t, middle)
        second = self.teacher(halfway, middle, prompt, negative, scale)
        end = step(halfway, second, middle, to)
        goal = self.path.prediction_between(z, end, t, to)
        samples = StepSamples(
            z, t, scale, prompt, negative, goal=goal, first=first, due=pool.is_due(slots),
            **pool.refresh(slots),
        )  # fmt: skip
        return samples, goal

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
        none = torch.zeros(n), nothing, nothing, nothing, torch.zeros(n)
        return GuidanceSamples(
            z, t, scale, prompt, negative, *none, *self.teacher(z, t, prompt, negative)
        )

    def tensors(self) -> Tensors:
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


def draw_negatives(n: int, prompts: int, prob: float, generator: torch.Generator) -> torch.Tensor:
    """(n,) indices of negative prompts: any prompt with probability ``prob``, else null."""
    negative = torch.full((n,), NULL)
    if prob:
        drawn = torch.randint(prompts, (n,), generator=generator)
        negative = torch.where(torch.rand(n, generator=generator) < prob, drawn, negative)
    return negative
