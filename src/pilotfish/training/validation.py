"""Validation during training, on held-out prompts: a figure, and pictures to look at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from pilotfish.conditioning import NULL
from pilotfish.data.images import to_pixels
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import Sample, TeacherStep, cfg_trajectories, sample
from pilotfish.teacher import Teacher
from pilotfish.training.config import TrainingConfig
from pilotfish.training.material import Material

SCALES = (2.0, 4.0, 7.0)
PROMPTS, STEPS, SHOWN = 16, 12, 4


class Validation(Protocol):
    """What a stage measures while it trains. It is small, and the same at every call; the
    full measurement is the evaluation's."""

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """Measure, and write ``folder/step-<step>.png``.

        Returns:
            The stage's measure averaged over w, by its name, and ``<name>_<w>`` for each.
        """
        ...


class GuidanceValidation:
    """The guidance error along CFG trajectories of a few held-out prompts."""

    def __init__(self, config: TrainingConfig, material: Material, teacher: Teacher) -> None:
        self.config, self.material, self.teacher = config, material, teacher
        self.trajectories: dict[float, list[TeacherStep]] = {}

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The pictures: no guidance, CFG, guided."""
        errors = {w: self._error(guide, w) for w in SCALES}
        texts, pipe = self.material.held_out[:SHOWN], self.material.pipe

        def column(w: float, with_guide: Guide | None) -> list[Sample]:
            return list(sample(pipe, texts, seeds=range(len(texts)), guidance_scale=w,
                               num_inference_steps=STEPS, guide=with_guide))  # fmt: skip

        save_columns(
            [column(1.0, None), column(4.0, None), column(4.0, guide)], folder, f"step-{step}"
        )
        return mean_and_each("guidance_error", errors)

    def _walk(self, w: float) -> list[TeacherStep]:
        if w not in self.trajectories:
            count = min(PROMPTS, len(self.material.held_out))
            first = len(self.material.prompts)
            generator = torch.Generator().manual_seed(self.config.seed)
            noise = torch.randn(count, *self.material.latent_shape, generator=generator)
            prompt = torch.arange(first, first + count)
            walk = cfg_trajectories(
                self.teacher, self.material.schedule, prompt, torch.full_like(prompt, NULL), noise,
                w, STEPS,
            )  # fmt: skip
            self.trajectories[w] = list(walk)
        return self.trajectories[w]

    @torch.no_grad()
    def _error(self, guide: Guide, w: float) -> float:
        student, texts = self.material.student(guide), self.teacher.prompts
        gap = whole = 0.0
        try:
            for state in self._walk(w):
                scale, text = torch.full((len(state.latents),), w), texts(state.prompt)
                guided = student(state.latents, state.timestep, text, texts.null, scale)
                gap += float((guided - state.cfg).pow(2).sum())
                whole += float((state.conditional - state.cfg).pow(2).sum())
        finally:
            student.hooks.remove()
        return gap / whole


class StepValidation:
    """How far the student's pictures are from the teacher's of twice as many steps:
    ``E||student - teacher||^2 / E||untrained - teacher||^2`` of final latents, where
    *untrained* is the teacher taking the student's steps. No guide is CFG."""

    def __init__(
        self, config: TrainingConfig, material: Material, teacher: Guide | None, steps: int
    ) -> None:
        self.config, self.material, self.teacher, self.steps = config, material, teacher, steps
        self.known: dict[float, tuple[list[Sample], list[Sample]]] = {}

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The pictures: the teacher with its own steps and with the
        student's, the student."""
        errors, columns = {}, []
        for w in SCALES:
            if w not in self.known:
                own = self._draw(self.teacher, w, 2 * self.steps)
                with warnings.catch_warnings():  # that these are not the teacher's own steps
                    warnings.simplefilter("ignore", UserWarning)
                    self.known[w] = own, self._draw(self.teacher, w, self.steps)
            goal, untrained = self.known[w]
            made = self._draw(guide, w, self.steps)
            errors[w] = _distance(made, goal) / _distance(untrained, goal)
            if w == SCALES[1]:
                columns = [c[:SHOWN] for c in (goal, untrained, made)]
        save_columns(columns, folder, f"step-{step}")
        return mean_and_each("latent_error", errors)

    def _draw(self, guide: Guide | None, w: float, steps: int) -> list[Sample]:
        texts = self.material.held_out[:PROMPTS]
        seeds = range(self.config.seed, self.config.seed + len(texts))
        return list(sample(self.material.pipe, texts, seeds=seeds, guidance_scale=w,
                           num_inference_steps=steps, guide=guide))  # fmt: skip


def _distance(a: Sequence[Sample], b: Sequence[Sample]) -> float:
    return sum(float((x.latents - y.latents).pow(2).sum()) for x, y in zip(a, b, strict=True))


def mean_and_each(name: str, by_scale: dict[float, float]) -> dict[str, float]:
    """One row of history: the mean over w, and the figure for each."""
    row = {f"{name}_{w:g}": value for w, value in by_scale.items()}
    return {name: sum(by_scale.values()) / len(by_scale), **row}


def save_columns(columns: Sequence[Sequence[Sample]], folder: Path, name: str) -> None:
    """A grid: a row for each prompt, a column for each way."""
    grid = torch.cat([torch.cat([s.image for s in c], 1) for c in columns], 2)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_pixels(grid).permute(1, 2, 0).cpu().numpy()).save(folder / f"{name}.png")
