"""How far one guided pass is from CFG's two, along the teacher's own trajectories.

    E ||guided - cfg||^2 / E ||cond - cfg||^2

0 is perfect, 1 is no guide. The states are those that CFG sampling of held-out prompts
passes through, from seeded noise, at each w.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from pilotfish.backbones import Origin, fingerprint
from pilotfish.conditioning import NULL, encoded, some_or_one, time_ids
from pilotfish.evaluation.result import GuidanceError
from pilotfish.evaluation.spread import gathered, share, whole_batch
from pilotfish.guides import Guide
from pilotfish.noise import NoisePath
from pilotfish.pipelines.sampling import TeacherStep, cfg_trajectories
from pilotfish.teacher import Student, Teacher

SCALES = (2.0, 4.0, 7.0)
Walks = dict[tuple[float, int], list[TeacherStep]]
"""The teacher's steps by w and the first prompt of a batch."""


class ErrorMeter:
    """Numerator and denominator of the guidance error, kept by w and timestep."""

    def __init__(self) -> None:
        self.sums: dict[tuple[float, int], tuple[float, float]] = {}

    def update(self, w: float, state: TeacherStep, guided: torch.Tensor) -> None:
        """Add one step: what the teacher says there and what the guided pass said."""
        key = (w, int(state.timestep[0]))
        error, whole = self.sums.get(key, (0.0, 0.0))
        self.sums[key] = (
            error + _distance(guided, state.cfg),
            whole + _distance(state.conditional, state.cfg),
        )

    def compute(self) -> GuidanceError:
        """Over all timesteps for each w; and at each timestep, the mean over w.

        Every w counts alike: the distances themselves grow with (w - 1)^2, and a sum over w
        would show the largest alone.
        """
        scales = sorted({w for w, _ in self.sums})
        times = sorted({t for _, t in self.sums}, reverse=True)
        by_w = {f"{w:g}": self._ratio([k for k in self.sums if k[0] == w]) for w in scales}
        by_timestep = {
            str(t): _mean([self._ratio([k]) for k in self.sums if k[1] == t]) for t in times
        }
        return GuidanceError(_mean(list(by_w.values())), by_w, by_timestep)

    def _ratio(self, keys: list[tuple[float, int]]) -> float:
        error = sum(self.sums[k][0] for k in keys)
        whole = sum(self.sums[k][1] for k in keys)
        return error / whole if whole else math.nan


@torch.no_grad()
def guidance_error(
    pipe: Any,
    guide: Guide,
    prompts: Sequence[str],
    *,
    guidance_scales: Sequence[float] = SCALES,
    num_inference_steps: int = 25,
    seed: int = 0,
    batch_size: int = 32,
    negative_prompts: Sequence[str] | None = None,
    ignoring: bool = False,
    known: Walks | None = None,
) -> GuidanceError:
    """The guidance error of ``guide`` on the denoiser of ``pipe``.

    Args:
        pipe: a text-to-image pipeline; its denoiser is frozen, and no hook stays on it.
        guide: any guide that fits it.
        prompts: held out of the guide's training.
        guidance_scales: each w, above 1.
        seed: of the first noise; the same for every w.
        batch_size: of each process.
        negative_prompts: one for each prompt; left out, the null prompt.
        ignoring: the guide is told the null prompt, whatever CFG is told.
        known: the teacher's trajectories, of an earlier guide in all the same settings: taken
            from here where they are, and added where they are not.

    Raises:
        ValueError: no prompt, another number of negative prompts, or a w of at most 1, where
            there is no guidance to miss.
        GuideError: the guide does not fit.
    """
    if not prompts:
        raise ValueError("the guidance error needs at least one prompt")
    if not guidance_scales or min(guidance_scales) <= 1:
        raise ValueError(f"the guidance error is defined for w above 1, not {guidance_scales}")
    negative_prompts = negative_prompts or [""] * len(prompts)
    if len(negative_prompts) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(negative_prompts)} negative prompts")
    unet, schedule = pipe.unet, NoisePath.of(pipe.scheduler)
    guide.check(fingerprint(unet, schedule.prediction_type), Origin.of(unet))
    guide.to(unet.device, unet.dtype).eval()
    texts, sizes = encoded(pipe, [*prompts, *negative_prompts]), time_ids(pipe)
    teacher = Teacher(unet, texts, sizes)
    negative = torch.tensor([NULL if not n else len(prompts) + i
                             for i, n in enumerate(negative_prompts)])  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *latent_shape(pipe), generator=generator)
    noise = noise.to(unet.device, unet.dtype)
    meter = ErrorMeter()
    student = Student(guide, unet, sizes)
    try:
        for w in guidance_scales:
            for batch in torch.arange(len(prompts)).split(whole_batch(batch_size)):
                index = batch[share(len(batch))]
                walk: Iterable[TeacherStep] = cfg_trajectories(
                    teacher, schedule, index, negative[index], noise[index], w,
                    num_inference_steps,
                )  # fmt: skip
                if known is not None:
                    part = (float(w), int(batch[0]))
                    known[part] = walk = known.get(part) or list(walk)
                scale = torch.full((len(index),), float(w))
                told = torch.full_like(index, NULL) if ignoring else negative[index]
                both = texts(index), some_or_one(texts, told)
                for state in walk:
                    guided = student(state.latents, state.timestep, *both, scale)
                    guided, conditional, cfg = gathered(
                        len(batch), guided, state.conditional, state.cfg
                    )
                    whole = replace(state, conditional=conditional, cfg=cfg)
                    meter.update(float(w), whole, guided)
    finally:
        student.hooks.remove()
    return meter.compute()


def latent_shape(pipe: Any) -> tuple[int, int, int]:
    """(C, h, w) of a pipeline's latents at its own size."""
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(pipe.unet.config.in_channels), int(height), int(width)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
