"""Validation during training: guidance error on held-out trajectories, and pictures to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from pilotfish.data.pictures import to_pixels
from pilotfish.distill.config import DistillConfig
from pilotfish.distill.material import Material
from pilotfish.guides import Guide
from pilotfish.passes import FrozenTeacher, GuidedStudent
from pilotfish.sampling import Sample, TeacherStep, cfg_trajectories, sample

SCALES = (2.0, 4.0, 7.0)
PROMPTS, STEPS, SHOWN = 16, 12, 4


class Validation:
    """A small fixed measurement, the same at every call: few prompts, few steps.

    The full measurement, with more of everything, is the evaluation's.
    """

    def __init__(self, config: DistillConfig, material: Material, teacher: FrozenTeacher) -> None:
        self.config, self.material, self.teacher = config, material, teacher
        self.trajectories: dict[float, list[TeacherStep]] = {}

    def run(self, guide: Guide, step: int, folder: Path) -> dict[str, float]:
        """Measure, and write ``folder/step-<step>.png``.

        Returns:
            ``guidance_error`` averaged over w, and ``guidance_error_<w>`` for each.
        """
        errors = {w: self._error(guide, w) for w in SCALES}
        folder.mkdir(parents=True, exist_ok=True)
        self._pictures(guide).save(folder / f"step-{step}.png")
        row = {f"guidance_error_{w:g}": e for w, e in errors.items()}
        return {"guidance_error": sum(errors.values()) / len(errors), **row}

    def _walk(self, w: float) -> list[TeacherStep]:
        if w not in self.trajectories:
            count = min(PROMPTS, len(self.material.held_out))
            first = len(self.material.prompts)
            generator = torch.Generator().manual_seed(self.config.seed)
            noise = torch.randn(count, *self.material.latent_shape, generator=generator)
            prompt = torch.arange(first, first + count)
            walk = cfg_trajectories(self.teacher, self.material.schedule, prompt, noise, w, STEPS)
            self.trajectories[w] = list(walk)
        return self.trajectories[w]

    @torch.no_grad()
    def _error(self, guide: Guide, w: float) -> float:
        student = GuidedStudent(guide, self.material.pipe.unet, self.teacher.null)
        gap = whole = 0.0
        for state in self._walk(w):
            scale = torch.full((len(state.latents),), w)
            text = self.teacher.prompts[state.prompt]
            guided = student(state.latents, state.timestep, text, scale)
            gap += float((guided - state.cfg).pow(2).sum())
            whole += float((state.conditional - state.cfg).pow(2).sum())
        student.hooks.remove()
        return gap / whole

    def _pictures(self, guide: Guide) -> Image.Image:
        """Rows: prompts. Columns: no guidance, CFG, guided."""
        texts, pipe = self.material.held_out[:SHOWN], self.material.pipe
        seeds = list(range(len(texts)))

        def column(w: float, with_guide: Guide | None) -> list[Sample]:
            return list(sample(pipe, texts, seeds=seeds, guidance_scale=w,
                               num_inference_steps=STEPS, guide=with_guide))  # fmt: skip

        columns = [column(1.0, None), column(4.0, None), column(4.0, guide)]
        grid = torch.cat([torch.cat([s.image for s in c], 1) for c in columns], 2)
        return Image.fromarray(to_pixels(grid).permute(1, 2, 0).numpy())
