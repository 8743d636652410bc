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
from pilotfish.pipelines.sampling import Sample, sample
from pilotfish.teacher import Teacher
from pilotfish.training.config import TrainingConfig
from pilotfish.training.context import TrainingContext

PROMPTS, STEPS, SHOWN = 16, 12, 4


class Validation(Protocol):
    """A stage's validation. It is small, and the same at every call."""

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """Measure, and write ``folder/step-<step>.png``.

        Returns:
            The stage's error averaged over w, by its name, and ``<name>_<w>`` for each.
        """
        ...


class GuidanceValidation:
    """Stage 1: the guidance error on a few held-out prompts."""

    def __init__(self, config: TrainingConfig, context: TrainingContext, teacher: Teacher) -> None:
        self.context = context
        count = min(PROMPTS, len(context.validation_prompts))
        prompt = torch.arange(len(context.prompts), len(context.prompts) + count)
        generator = torch.Generator().manual_seed(config.seed)
        self.trajectories = Trajectories(
            teacher, context.path, prompt, torch.full_like(prompt, NULL),
            torch.randn(count, *context.latent_shape, generator=generator),
            guidance_scales=SCALES, num_inference_steps=STEPS, cache=True,
        )  # fmt: skip

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The images: no guidance, CFG, guided."""
        student = self.context.student(guide)
        try:
            error = guidance_error(student, self.trajectories)
        finally:
            student.hooks.remove()
        texts, pipe = self.context.validation_prompts[:SHOWN], self.context.pipe

        def column(w: float, with_guide: Guide | None) -> list[Sample]:
            return list(sample(pipe, texts, seeds=range(len(texts)), guidance_scale=w,
                               num_inference_steps=STEPS, guide=with_guide))  # fmt: skip

        save_columns(
            [column(1.0, None), column(4.0, None), column(4.0, guide)], folder, f"step-{step}"
        )
        return mean_and_each("guidance_error", error.by_w)


class StepValidation:
    """Stage 2: ``E||student - teacher||^2 / E||untrained - teacher||^2`` of final latents. The
    teacher takes twice as many steps; *untrained* is the teacher with the student's steps.

    Args:
        teacher: the guide that is the teacher; None is CFG.
        steps: the student's.
    """

    def __init__(
        self, config: TrainingConfig, context: TrainingContext, teacher: Guide | None, steps: int
    ) -> None:
        self.config, self.context, self.teacher, self.steps = config, context, teacher, steps
        self.cached: dict[float, tuple[list[Sample], list[Sample]]] = {}

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The images: the teacher with its own steps and with the
        student's, the student."""
        errors, columns = {}, []
        for w in SCALES:
            if w not in self.cached:
                own = self._sample(self.teacher, w, 2 * self.steps)
                with warnings.catch_warnings():  # the teacher does not take its own steps here
                    warnings.simplefilter("ignore", UserWarning)
                    self.cached[w] = own, self._sample(self.teacher, w, self.steps)
            goal, untrained = self.cached[w]
            made = self._sample(guide, w, self.steps)
            errors[f"{w:g}"] = _distance(made, goal) / _distance(untrained, goal)
            if w == SCALES[1]:
                columns = [c[:SHOWN] for c in (goal, untrained, made)]
        save_columns(columns, folder, f"step-{step}")
        return mean_and_each("latent_error", errors)

    def _sample(self, guide: Guide | None, w: float, steps: int) -> list[Sample]:
        texts = self.context.validation_prompts[:PROMPTS]
        seeds = range(self.config.seed, self.config.seed + len(texts))
        grid: dict[str, Any] = {}
        if self.context.path.prediction_type == "flow":  # the scheduler's own grid is another
            grid["sigmas"] = torch.linspace(1, 1 / steps, steps).tolist()
        return list(sample(self.context.pipe, texts, seeds=seeds, guidance_scale=w,
                           num_inference_steps=steps, guide=guide, **grid))  # fmt: skip


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
