"""CFG alone, by guidance scale: what there is for a guide to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.gallery import Gallery
from pilotfish.evaluation.result import Scores
from pilotfish.evaluation.scores import Progress

SWEEP = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)


def sweep(
    pipe: Any,
    *,
    prompts: Sequence[str],
    names: Sequence[str],
    pictures_folder: str | Path | None,
    samples: int = 1000,
    seed: int = 0,
    guidance_scales: Sequence[float] = SWEEP,
    num_inference_steps: int = 25,
    batch_size: int = 32,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> dict[str, Scores]:
    """What CFG alone does for a pipeline: scores by w, from the same seeds at each.

    Raises:
        ValueError: as :class:`Gallery`.
    """
    gallery = Gallery(
        pipe, judge or Judge.embedded(), prompts=prompts, names=names,
        pictures_folder=pictures_folder, samples=samples, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    return {
        f"{w:g}": gallery.draw(w, num_inference_steps, None, progress, f"w = {w:g}").scores
        for w in guidance_scales
    }
