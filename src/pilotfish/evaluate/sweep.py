"""CFG alone, by guidance scale: what there is for a guide to keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pilotfish.evaluate.features import Judge
from pilotfish.evaluate.metrics import indices
from pilotfish.evaluate.result import Scores
from pilotfish.evaluate.scores import Progress, ScoreMeter, real_pictures
from pilotfish.evaluate.ways import cycle, draw

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
        ValueError: as :func:`evaluate_host`.
    """
    if samples < 2:
        raise ValueError(f"at least two samples are needed, not {samples}")
    judge = judge or Judge.embedded()
    texts, seeds = cycle(prompts, samples, seed)
    right, named = indices(texts, names), judge.texts(list(names))
    real = real_pictures(pipe, pictures_folder)
    found = {}
    for w in guidance_scales:
        meter = ScoreMeter(judge, named, real)
        for i in range(0, samples, batch_size):
            part = slice(i, i + batch_size)
            drawn = draw(
                pipe, texts[part], seeds[part], guidance_scale=w,
                num_inference_steps=num_inference_steps,
            )  # fmt: skip
            features = judge.images(drawn.images)
            meter.update(drawn.images, features, right[part].to(features.device))
            if progress:
                progress(f"w = {w:g}", min(i + batch_size, samples), samples)
        found[f"{w:g}"] = meter.compute()
    return found
