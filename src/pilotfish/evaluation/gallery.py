"""One host, drawn in one way after another from the same prompts and noise, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pilotfish.evaluation.cost import counted_rows
from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.metrics import indices
from pilotfish.evaluation.result import Scores
from pilotfish.evaluation.scores import Progress, ScoreMeter, real_pictures
from pilotfish.evaluation.spread import share, total, whole_batch
from pilotfish.evaluation.ways import draw, walk
from pilotfish.pipelines.sampling import Attachable


@dataclass(frozen=True)
class Judged:
    """The pictures of one way, as far as they are needed further on.

    Attributes:
        scores: the judge's.
        found: (N,) 1 where the right name was found first.
        latents: (N, C, h, w) final latents.
        passes: of the denoiser for one picture.
    """

    scores: Scores
    found: torch.Tensor
    latents: torch.Tensor
    passes: float


class Gallery:
    """What is drawn on one host, and how it is judged.

    Args:
        prompts: what is drawn; all of them are among the names. They go round, each time with
            new seeds.
        names: among which the judge must find the right one.
        pictures_folder: real pictures in the host's style, the reference of ``fd_judge``.
        samples: pictures in each way.
        seed: of the first picture; the others follow.
        batch_size: of each process.

    Raises:
        ValueError: a prompt that is no name, or fewer than two samples.
    """

    def __init__(
        self, pipe: Any, judge: Judge, *, prompts: Sequence[str], names: Sequence[str],
        pictures_folder: str | Path | None, samples: int, seed: int, batch_size: int = 32,
    ) -> None:  # fmt: skip
        if samples < 2:
            raise ValueError(f"at least two samples are needed, not {samples}")
        self.pipe, self.judge, self.batch_size = pipe, judge, whole_batch(batch_size)
        self.texts, self.seeds = walk(prompts, samples, seed)
        self.right, self.named = indices(self.texts, names), judge.texts(list(names))
        self.real = real_pictures(pipe, pictures_folder)

    def draw(
        self, guidance_scale: float, num_inference_steps: int, method: Attachable | None = None,
        progress: Progress | None = None, what: str = "pictures",
    ) -> Judged:  # fmt: skip
        """All pictures in one way: with a method at w, or with the pipeline's own CFG."""
        meter, latents, samples = ScoreMeter(self.judge, self.named, self.real), [], len(self.texts)
        mine = 0
        with counted_rows(self.pipe.unet) as rows:
            for i in range(0, samples, self.batch_size):
                part = slice(i, i + self.batch_size)
                drawn = draw(
                    self.pipe, self.texts[part], self.seeds[part], guidance_scale=guidance_scale,
                    num_inference_steps=num_inference_steps, guide=method,
                )  # fmt: skip
                mine += len(share(len(drawn.prompts)))
                features = self.judge.images(drawn.images)
                meter.update(drawn.images, features, self.right[part].to(features.device))
                latents.append(drawn.latents)
                if progress:
                    progress(what, min(i + self.batch_size, samples), samples)
        passes = total(sum(rows)) / total(mine)
        return Judged(meter.compute(), meter.prompt.found(), torch.cat(latents), passes)
