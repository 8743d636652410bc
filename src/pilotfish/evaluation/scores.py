"""The judge's scores of one way of guidance, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pilotfish.data.images import from_pixels, load_images
from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.metrics import FrechetMeter, PromptMeter
from pilotfish.evaluation.result import Scores
from pilotfish.guidance_error import latent_shape

# (what is being measured, done, of how many)
Progress = Callable[[str, int, int], None]


class ScoreMeter:
    """The judge's scores of one way of guidance."""

    def __init__(self, judge: Judge, names: torch.Tensor, real: torch.Tensor | None) -> None:
        self.prompt, self.frechet = PromptMeter(names), FrechetMeter(judge, real)

    def update(self, images: torch.Tensor, features: torch.Tensor, right: torch.Tensor) -> None:
        """Add (N, 3, H, W) pictures, their (N, d) features, the (N,) places of their names."""
        self.prompt.update(features, right)
        self.frechet.update(images)

    def compute(self) -> Scores:
        """What was measured."""
        return Scores(*self.prompt.compute(), self.frechet.compute())


def real_pictures(pipe: Any, folder: str | Path | None) -> torch.Tensor | None:
    """(M, 3, H, W) real pictures in [-1, 1], as large as the pipeline's own."""
    if folder is None:
        return None
    size = latent_shape(pipe)[1] * int(pipe.vae_scale_factor)
    return from_pixels(load_images(folder, size).pixels)


def prefixed(progress: Progress | None, name: str) -> Progress | None:
    """The same progress, told whose it is."""
    if progress is None:
        return None
    tell = progress
    return lambda what, done, total: tell(f"{name}: {what}", done, total)
