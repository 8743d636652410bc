"""The guidance error: how far one guided pass is from CFG, along CFG trajectories.

    E ||guided - cfg||^2 / E ||conditional - cfg||^2

A mean squared error, normalised by that of no guide: 0 is CFG, 1 is no guide. The latents are
those that CFG sampling of held-out prompts passes through, from seeded noise, at each w.
Training validates with it and evaluation reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Self

import torch

from pilotfish.backbones import Backbone
from pilotfish.conditioning import NULL, encoded, some_or_one
from pilotfish.guidances import CFG, Guidance
from pilotfish.guides import Guide
from pilotfish.interface import GuideError, GuideProtocol, Refresh
from pilotfish.noise import NoisePath
from pilotfish.pipelines.attach import check
from pilotfish.pipelines.loading import weaker_denoiser
from pilotfish.pipelines.sampling import TeacherStep, cfg_trajectories
from pilotfish.refresh import RefreshSteps, new_refresh, places
from pilotfish.teacher import Student, Teacher

SCALES = (2.0, 4.0, 7.0)

# (w, normalised time) -> squared distances of guided and of conditional to CFG, of guided to
# conditional
Sums = dict[tuple[float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class GuidanceError:
    """0 is CFG, 1 is no guide.

    Attributes:
        mean: over w; every w counts alike, although the distances grow with (w - 1)^2.
        by_w: ratio of the sums over all times, ``{"2": ...}``.
        by_time: mean over w at each normalised time, from noise to image:
            ``{"0.999": ...}``.
        cosine: of what the guide and what CFG add to the conditional prediction, over all times;
            the mean over w. 1 is the right direction, whatever the length; 0 that nothing is
            added; NaN in results of 0.1.
    """

    mean: float
    by_w: dict[str, float]
    by_time: dict[str, float]
    cosine: float = math.nan

    @classmethod
    def of(cls, sums: Sums) -> Self:
        """The ratios of summed distances."""
        scales = sorted({w for w, _ in sums})
        times = sorted({t for _, t in sums}, reverse=True)
        by_w = {f"{w:g}": _ratio(sums[k] for k in sums if k[0] == w) for w in scales}
        by_time = {f"{t:g}": _mean([_ratio([sums[k]]) for k in sums if k[1] == t]) for t in times}
        cosines = [_cosine(sums[k] for k in sums if k[0] == w) for w in scales]
        return cls(_mean(list(by_w.values())), by_w, by_time, _mean(cosines))


class Trajectories:
    """CFG sampling of some prompts by the teacher, at each w and in batches.

    Args:
        teacher: the frozen denoiser.
        path: its noise path.
        prompt: (N,) indices of the teacher's prompts.
        negative: (N,) indices of the negative prompts, ``NULL`` for none.
        noise: (N, C, h, w) where the trajectories start, at every w.
        guidance_scales: each w, above 1.
        cache: keep every step in memory, for further guides.

    Raises:
        ValueError: no prompt, or a w of at most 1, where there is no guidance.
    """

    def __init__(
        self, teacher: Teacher, path: NoisePath, prompt: torch.Tensor, negative: torch.Tensor,
        noise: torch.Tensor, *, guidance_scales: Sequence[float] = SCALES,
        num_inference_steps: int = 25, batch_size: int = 32, cache: bool = False,
    ) -> None:  # fmt: skip
        if not guidance_scales or min(guidance_scales) <= 1:
            raise ValueError(f"the guidance error is defined for w above 1, not {guidance_scales}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.teacher, self.path, self.noise = teacher, path, noise
        self.prompt, self.negative = prompt, negative
        self.guidance_scales = tuple(map(float, guidance_scales))
        self.num_inference_steps, self.batch_size = num_inference_steps, batch_size
        self.cache: dict[tuple[float, int], list[TeacherStep]] | None = {} if cache else None

    @classmethod
    def of_pipeline(
        cls, pipe: Any, prompts: Sequence[str], *, negative_prompts: Sequence[str] | None = None,
        seed: int = 0, process: tuple[int, int] = (0, 1), guidance: Guidance = CFG,
        num_frames: int | None = None, **settings: Any,
    ) -> Self:  # fmt: skip
        """Those of a pipeline of text to image or video; its denoiser is frozen.

        Args:
            prompts: held out of the guide's training.
            negative_prompts: as many as prompts; left out, the null prompt.
            seed: of the noise.
            process: (index, count), where several processes share the prompts.
            guidance: of the teacher.
            num_frames: of a video; left out, the pipeline's own number.
            settings: as of the class.

        Raises:
            ValueError: no prompt, another number of negative prompts, a w of at most 1, or
                ``num_frames`` that the pipeline does not take.
        """
        if not prompts:
            raise ValueError("the guidance error needs at least one prompt")
        others = list(negative_prompts or ())
        if others and len(others) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(others)} negative prompts")
        backbone = Backbone.of_pipeline(pipe)
        if num_frames is not None:
            backbone = backbone.at(None, backbone.latent_frames_of(pipe, num_frames))
        denoiser = backbone.denoiser
        weak = weaker_denoiser(guidance, backbone)
        texts, sizes = encoded(pipe, [*prompts, *others]), backbone.sizes(pipe)
        teacher = Teacher(denoiser, texts, sizes, guidance, weak)
        negative = torch.full((len(prompts),), NULL)
        for i, text in enumerate(others):
            negative[i] = len(prompts) + i if text else NULL
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), *backbone.latent_shape(), generator=generator)
        index, count = process
        mine = torch.arange(index, len(prompts), count)
        path = backbone.noise_path(pipe)
        return cls(teacher, path, mine, negative[mine], noise[mine].to(denoiser.device), **settings)

    def __len__(self) -> int:
        """How many batches there are, over all w."""
        return len(self.guidance_scales) * math.ceil(len(self.prompt) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[float, torch.Tensor, Iterable[TeacherStep]]]:
        """(w, places (n,) of a batch among the prompts, its steps), batch after batch."""
        for w in self.guidance_scales:
            for index in torch.arange(len(self.prompt)).split(self.batch_size):
                if len(index):
                    yield w, index, self._walk(w, index)

    def _walk(self, w: float, index: torch.Tensor) -> Iterable[TeacherStep]:
        key = (w, int(index[0]))
        if self.cache is not None and key in self.cache:
            return self.cache[key]
        steps = cfg_trajectories(
            self.teacher, self.path, self.prompt[index], self.negative[index], self.noise[index],
            w, self.num_inference_steps,
        )  # fmt: skip
        if self.cache is None:
            return steps
        self.cache[key] = list(steps)
        return self.cache[key]


@torch.no_grad()
def guidance_error(
    student: Student, trajectories: Trajectories, *, with_negative: bool = True,
    refresh: RefreshSteps = 0,
    gather: Callable[[Sums], Sequence[Sums]] = lambda sums: [sums],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GuidanceError:  # fmt: skip
    """The guidance error of a student along the trajectories of its teacher.

    Args:
        with_negative: False: the student is conditioned on the null prompt, whatever negative
            prompt CFG uses.
        refresh: the steps of a trajectory that run both passes: how many, what ratio, or which.
            They count as the others do.
        gather: the sums of all processes, from those of this one.
        progress: called before the first batch and after each with how many are done, and of how
            many.
    """
    sums: Sums = {}
    teacher, prompts = trajectories.teacher, trajectories.teacher.prompts
    few_steps = student.guide.times is not None
    doubled = places(refresh, trajectories.num_inference_steps, few_steps=few_steps)
    progress(0, len(trajectories))
    for batch, (w, index, steps) in enumerate(trajectories, 1):
        negative = trajectories.negative[index]
        if not with_negative:
            negative = torch.full_like(negative, NULL)
        texts = prompts(trajectories.prompt[index]), some_or_one(prompts, negative)
        scale = torch.full((len(index),), w)
        found: Refresh | None = None
        for number, step in enumerate(steps):
            due, before = None, found
            if number in doubled:
                both = teacher(step.latents, step.time, step.prompt, negative)
                guided, due = teacher.guided(*both, w), torch.ones(len(index), dtype=torch.bool)
                found = _refresh(student.guide, step, *both, before)
            if due is None or student.guide.corrects_refresh:
                guided = student(step.latents, step.time, *texts, scale, before, due)
            key = (w, round(float(step.time[0]), 4))
            pairs = (guided, step.cfg), (step.conditional, step.cfg), (guided, step.conditional)
            _add(sums, key, *(_distance(a, b) for a, b in pairs))
        progress(batch, len(trajectories))
    total: Sums = {}
    for some in gather(sums):
        for key, distances in some.items():
            _add(total, key, *distances)
    return GuidanceError.of(total)


def pipeline_guidance_error(
    pipe: Any, guide: Guide, trajectories: Trajectories, **settings: Any
) -> GuidanceError:
    """:func:`guidance_error` of a guide on the denoiser of a pipeline, along
    :meth:`Trajectories.of_pipeline`.

    Raises:
        GuideError: the guide does not fit, or was taught another guidance than that of the
            trajectories; or the pipeline has two denoisers.
    """
    with _student(pipe, guide) as student:
        taught, measured = guide.guidance, trajectories.teacher.guidance
        if taught != measured:
            raise GuideError(
                f"this guide was taught {taught.title} ({taught.plain()}), and the trajectories "
                f"are those of {measured.title} ({measured.plain()})"
            )
        return guidance_error(student, trajectories, **settings)


@contextmanager
def _student(pipe: Any, guide: Guide) -> Iterator[Student]:
    """The denoiser with the guide, which is copied where it lies elsewhere or in another
    precision; no hook stays."""
    backbone, *others = check(guide, pipe)
    if others:
        raise GuideError(
            f"the guidance error is measured on one denoiser, and this {type(pipe).__name__} has "
            "two; measure each in a pipeline of its own"
        )
    denoiser = backbone.denoiser
    if (guide.device, guide.dtype) != (denoiser.device, denoiser.dtype):
        guide = deepcopy(guide).to(denoiser.device, denoiser.dtype)
    student = Student(guide.eval(), denoiser, backbone.sizes(pipe))
    try:
        yield student
    finally:
        student.hooks.remove()


def _refresh(
    guide: GuideProtocol, step: TeacherStep, unconditional: torch.Tensor, conditional: torch.Tensor,
    before: Refresh | None,
) -> Refresh:  # fmt: skip
    time = step.time.to(guide.device)
    difference, conditional, latents = (
        x.to(guide.device, guide.dtype)
        for x in (conditional - unconditional, conditional, step.latents)
    )
    before = before or Refresh.unknown(latents, time)
    return new_refresh(difference, conditional, latents, time, before)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def _add(sums: Sums, key: tuple[float, float], *distances: float) -> None:
    error, reference, added = (
        a + b for a, b in zip(sums.get(key, (0.0, 0.0, 0.0)), distances, strict=True)
    )
    sums[key] = error, reference, added


def _ratio(distances: Iterable[tuple[float, float, float]]) -> float:
    error, reference, _ = (sum(part) for part in zip(*distances, strict=True))
    return error / reference if reference else math.nan


def _cosine(distances: Iterable[tuple[float, float, float]]) -> float:
    """By the law of cosines."""
    error, reference, added = (sum(part) for part in zip(*distances, strict=True))
    length = 2 * math.sqrt(reference * added)
    return (reference + added - error) / length if length else 0.0


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
