"""Validation during training, on held-out prompts: a relative error, and images to look at.

Images are sampled by the deterministic steps of :class:`~pilotfish.noise.NoisePath`, with the
embeddings of the training, so the text encoders need not be there. They are decoded one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from PIL import Image

from pilotfish.conditioning import NULL, some_or_one
from pilotfish.data.images import to_pixels
from pilotfish.guidance_error import SCALES, Trajectories, guidance_error
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import decode, final_latents, middle_frame
from pilotfish.teacher import Student, Teacher
from pilotfish.training.config import TrainingConfig
from pilotfish.training.context import ImageSize, TrainingContext

PROMPTS, STEPS = 16, 12
SHOWN_SCALE = 4.0
"""The images are sampled at the validated scale that is nearest to this."""


class Predict(Protocol):
    """A prediction (N, C, h, w) at times (N,) for prompts of indices (N,)."""

    def __call__(self, z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor: ...


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


class _Validation:
    """What both validations share.

    Attributes:
        scales: to measure at.
        shown: that of the images.
        batch_size: one that the training has memory for.
        sizes: of the images.
        prompt: (N,) indices of the validation prompts that are used.
    """

    def __init__(self, config: TrainingConfig, context: TrainingContext, teacher: Teacher) -> None:
        self.config, self.context, self.cfg = config, context, teacher
        self.sizes = context.sizes
        self.scales = validation_scales(config)
        self.shown = min(self.scales, key=lambda w: abs(w - SHOWN_SCALE))
        self.batch_size = min(32, config.train_batch_size)
        first, count = len(context.prompts), len(context.validation_prompts)
        self.prompt = torch.arange(first, first + min(count, PROMPTS))

    def by_cfg(self, w: float) -> Predict:
        """The prediction of the teacher; at w = 1 that of the prompt alone."""

        @torch.no_grad()
        def predict(z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            if w == 1:
                return self.cfg.base(z, t, self.cfg.prompts(prompt)).float()
            both = self.cfg(z, t, prompt, torch.full_like(prompt, NULL))
            return self.cfg.guided(*both, w)

        return predict

    def by_student(self, student: Student, w: float) -> Predict:
        """The prediction of the base with a guide."""

        @torch.no_grad()
        def predict(z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            texts, negative = self.cfg.prompts, torch.full_like(prompt, NULL)
            place = next(student.guide.parameters()).device
            made: torch.Tensor = student(
                z.to(place), t.to(place), texts(prompt), some_or_one(texts, negative),
                torch.full(t.shape, w, device=place),
            )  # fmt: skip
            return made.float().to(z.device)

        return predict

    @contextmanager
    def student(self, guide: Guide) -> Iterator[Student]:
        """The base with a guide, inside the block."""
        student = self.context.student(guide)
        try:
            yield student
        finally:
            student.hooks.remove()

    def latents(
        self, predict: Predict, prompt: torch.Tensor, steps: int, size: ImageSize | None = None
    ) -> torch.Tensor:  # fmt: skip
        """(N, C, h, w) final latents of a size, or the first, each from noise of its own seed."""
        made, size = [], size or self.sizes[0]
        for index in prompt.split(self.batch_size):
            seeds = self.config.seed + index - len(self.context.prompts)
            draws = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
            noise = torch.stack([torch.randn(size.shape, generator=draw) for draw in draws])
            made.append(final_latents(size.path, partial(predict, prompt=index), noise, steps))
        return torch.cat(made)

    def images(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """The decoded images (3, H, W) of (n, C, h, w), on the CPU; of videos their middle
        frames."""
        with self.context.vae_placed():
            return [middle_frame(decode(self.context.pipe, x[None])[0]).cpu() for x in latents]

    def previews(self, predict: Predict, steps: int) -> list[torch.Tensor]:
        """Images of the first prompts, (3, H, W) each, in turn of every size."""
        prompt, count = self.prompt[: self.config.num_validation_images], len(self.sizes)
        found: dict[int, torch.Tensor] = {}
        for i, size in enumerate(self.sizes[: len(prompt)]):
            made = self.images(self.latents(predict, prompt[i::count], steps, size))
            found |= dict(zip(range(i, len(prompt), count), made, strict=True))
        return [found[i] for i in range(len(prompt))]


class GuidanceValidation(_Validation):
    """Stage 1: the guidance error on a few held-out prompts."""

    def __init__(self, config: TrainingConfig, context: TrainingContext, teacher: Teacher) -> None:
        super().__init__(config, context, teacher)
        generator = torch.Generator().manual_seed(config.seed)
        self.trajectories = Trajectories(
            teacher, context.path, self.prompt, torch.full_like(self.prompt, NULL),
            torch.randn(len(self.prompt), *context.latent_shape, generator=generator),
            guidance_scales=self.scales, num_inference_steps=STEPS, batch_size=self.batch_size,
            cache=True,
        )  # fmt: skip
        self.columns: list[list[torch.Tensor]] = []

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The images: no guidance, the teacher, guided."""
        with self.student(guide) as student:
            error = guidance_error(student, self.trajectories)
            guided = self.previews(self.by_student(student, self.shown), STEPS)
        if not self.columns:  # the base does not change
            self.columns = [self.previews(self.by_cfg(w), STEPS) for w in (1.0, self.shown)]
        save_columns([*self.columns, guided], folder, f"step-{step}")
        return mean_and_each("guidance_error", error.by_w)


class StepValidation(_Validation):
    """Stage 2: ``E||student - teacher||^2 / E||untrained - teacher||^2`` of final latents. The
    teacher takes twice as many steps; *untrained* is the teacher with the student's steps.

    Args:
        teacher: the base's two passes.
        guide: the guide that is the teacher; None is the guidance that the student was taught.
        steps: the student's.
    """

    def __init__(
        self, config: TrainingConfig, context: TrainingContext, teacher: Teacher,
        guide: Guide | None, steps: int,
    ) -> None:  # fmt: skip
        super().__init__(config, context, teacher)
        self.teacher, self.steps = guide, steps
        self.cached: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
        self.columns: list[list[torch.Tensor]] = []

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """See :class:`Validation`. The images: the teacher with its own steps and with the
        student's, the student."""
        errors, count = {}, self.config.num_validation_images
        for w in self.scales:
            if w not in self.cached:
                self.cached[w] = self._by_teacher(w)
            goal, untrained = self.cached[w]
            with self.student(guide) as student:
                made = self.latents(self.by_student(student, w), self.prompt, self.steps)
            errors[f"{w:g}"] = _distance(made, goal) / _distance(untrained, goal)
            if w == self.shown:
                if not self.columns:
                    self.columns = [self.images(x[:count]) for x in (goal, untrained)]
                save_columns([*self.columns, self.images(made[:count])], folder, f"step-{step}")
        return mean_and_each("latent_error", errors)

    def _by_teacher(self, w: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Its final latents after its own steps and after the student's."""
        both = (2 * self.steps, self.steps)
        if self.teacher is None:
            goal, untrained = (self.latents(self.by_cfg(w), self.prompt, n) for n in both)
            return goal, untrained
        with self.student(self.teacher) as student:
            predict = self.by_student(student, w)
            goal, untrained = (self.latents(predict, self.prompt, n) for n in both)
            return goal, untrained


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).pow(2).sum())


def mean_and_each(name: str, by_w: dict[str, float]) -> dict[str, float]:
    """A row of the history: the mean over w, and the figure for each."""
    row = {f"{name}_{w}": value for w, value in by_w.items()}
    return {name: sum(by_w.values()) / len(by_w), **row}


def save_columns(columns: Sequence[Sequence[torch.Tensor]], folder: Path, name: str) -> None:
    """A grid of images (3, H, W); a row holds images of one size."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [to_pixels(torch.cat(list(row), 2)) for row in zip(*columns, strict=True)]
    width = max(row.shape[2] for row in rows)
    grid = torch.cat([F.pad(row, (0, width - row.shape[2]), value=255) for row in rows], 1)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
