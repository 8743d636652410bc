"""Validation during training, on held-out prompts: a relative error, and images to look at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from pilotfish.conditioning import NULL
from pilotfish.data.images import to_pixels
from pilotfish.guidance_error import SCALES, Trajectories, guidance_error
from pilotfish.guides import Guide
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.sampling import Attachable, Sample, sample
from pilotfish.teacher import Teacher
from pilotfish.training.config import TrainingConfig
from pilotfish.training.context import TrainingContext

PROMPTS, STEPS, SHOWN = 16, 12, 4
SHOWN_SCALE = 4.0
"""The images are sampled at the validated scale that is nearest to this."""


class Validation(Protocol):
    """A stage's validation. It is small, and the same at every call."""

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """Measure, and write ``folder/step-<step>.png``.

        Returns:
            The stage's error averaged over w, by its name, and ``<name>_<w>`` for each.
        """
        ...


def validation_scales(config: TrainingConfig) -> tuple[float, ...]:
    """Those of the usual scales in the range of training; where there are none, its ends, but not
    1, which is no guidance."""
    low, high = config.guidance_scale_min, config.guidance_scale_max
    inside = [w for w in SCALES if low <= w <= high]
    return tuple(inside or sorted({w for w in (low, high) if w > 1}))


class _Settings:
    """What both validations take from a configuration.

    Attributes:
        scales: to measure at.
        shown: that of the images.
        batch_size: one that the training has memory for.
    """

    def __init__(self, config: TrainingConfig, context: TrainingContext) -> None:
        self.config, self.context = config, context
        self.scales = validation_scales(config)
        self.shown = min(self.scales, key=lambda w: abs(w - SHOWN_SCALE))
        self.batch_size = min(32, config.train_batch_size)


class GuidanceValidation(_Settings):
    """Stage 1: the guidance error on a few held-out prompts."""

    def __init__(self, config: TrainingConfig, context: TrainingContext, teacher: Teacher) -> None:
        super().__init__(config, context)
        count = min(PROMPTS, len(context.validation_prompts))
        prompt = torch.arange(len(context.prompts), len(context.prompts) + count)
        generator = torch.Generator().manual_seed(config.seed)
        self.trajectories = Trajectories(
            teacher, context.path, prompt, torch.full_like(prompt, NULL),
            torch.randn(count, *context.latent_shape, generator=generator),
            guidance_scales=self.scales, num_inference_steps=STEPS, batch_size=self.batch_size,
            cache=True,
        )  # fmt: skip

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The images: no guidance, the teacher's, guided."""
        student = self.context.student(guide)
        try:
            error = guidance_error(student, self.trajectories)
        finally:
            student.hooks.remove()
        texts, pipe = self.context.validation_prompts[:SHOWN], self.context.pipe

        def column(w: float, method: Attachable | None) -> list[Sample]:
            return list(sample(pipe, texts, seeds=range(len(texts)), guidance_scale=w,
                               num_inference_steps=STEPS, batch_size=self.batch_size,
                               guide=method))  # fmt: skip

        w, methods = self.shown, (Reference(guide.guidance), Refreshed(guide, 0))
        columns = [column(1.0, None), *(column(w, method) for method in methods)]
        save_columns(columns, folder, f"step-{step}")
        return mean_and_each("guidance_error", error.by_w)


class StepValidation(_Settings):
    """Stage 2: ``E||student - teacher||^2 / E||untrained - teacher||^2`` of final latents. The
    teacher takes twice as many steps; *untrained* is the teacher with the student's steps.

    Args:
        teacher: the guide that is the teacher; None is the guidance that the student was taught.
        steps: the student's.
    """

    def __init__(
        self, config: TrainingConfig, context: TrainingContext, teacher: Guide | None, steps: int
    ) -> None:
        super().__init__(config, context)
        self.teacher, self.steps = teacher, steps
        self.cached: dict[float, tuple[list[Sample], list[Sample]]] = {}

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The images: the teacher with its own steps and with the
        student's, the student."""
        errors, columns = {}, []
        for w in self.scales:
            if w not in self.cached:
                own, known = Reference(guide.guidance), self.teacher
                teacher = own if known is None else Refreshed(known, 0)
                goal = self._sample(teacher, w, 2 * self.steps)
                with warnings.catch_warnings():  # the teacher does not take its own steps here
                    warnings.simplefilter("ignore", UserWarning)
                    self.cached[w] = goal, self._sample(teacher, w, self.steps)
            goal, untrained = self.cached[w]
            made = self._sample(Refreshed(guide, 0), w, self.steps)
            errors[f"{w:g}"] = _distance(made, goal) / _distance(untrained, goal)
            if w == self.shown:
                columns = [c[:SHOWN] for c in (goal, untrained, made)]
        save_columns(columns, folder, f"step-{step}")
        return mean_and_each("latent_error", errors)

    def _sample(self, method: Attachable, w: float, steps: int) -> list[Sample]:
        texts = self.context.validation_prompts[:PROMPTS]
        seeds = range(self.config.seed, self.config.seed + len(texts))
        grid: dict[str, Any] = {}
        if self.context.path.prediction_type == "flow":  # the scheduler's own grid is another
            grid = self.context.backbone.even_grid(steps)
        return list(sample(self.context.pipe, texts, seeds=seeds, guidance_scale=w,
                           num_inference_steps=steps, batch_size=self.batch_size,
                           guide=method, **grid))  # fmt: skip


def _distance(a: Sequence[Sample], b: Sequence[Sample]) -> float:
    return sum(float((x.latents - y.latents).pow(2).sum()) for x, y in zip(a, b, strict=True))


def mean_and_each(name: str, by_w: dict[str, float]) -> dict[str, float]:
    """A row of the history: the mean over w, and the figure for each."""
    row = {f"{name}_{w}": value for w, value in by_w.items()}
    return {name: sum(by_w.values()) / len(by_w), **row}


def save_columns(columns: Sequence[Sequence[Sample]], folder: Path, name: str) -> None:
    """A grid of images, one row per prompt."""
    grid = torch.cat([torch.cat([s.image for s in c], 1) for c in columns], 2)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_pixels(grid).permute(1, 2, 0).cpu().numpy()).save(folder / f"{name}.png")
