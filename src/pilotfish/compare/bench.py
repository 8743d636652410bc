"""One host, on which method after method is measured against the same pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pilotfish.compare.result import HostScores
from pilotfish.evaluate.cost import counted_rows
from pilotfish.evaluate.features import Judge
from pilotfish.evaluate.guidance_error import guidance_error
from pilotfish.evaluate.hosts import Host
from pilotfish.evaluate.metrics import LatentMeter, gain_kept, gain_kept_interval, indices
from pilotfish.evaluate.result import Interval, Scores
from pilotfish.evaluate.scores import ScoreMeter, real_pictures
from pilotfish.evaluate.ways import cycle, draw
from pilotfish.guides import Guide
from pilotfish.sampling import Attachable


@dataclass(frozen=True)
class Measurement:
    """How every method is measured.

    Attributes:
        names: what is drawn, and among which the judge must find the right one.
        held_out: prompts of the guidance error.
        samples: pictures in each way; the names go round, each time with new seeds.
        seed: of the first picture; the others follow.
    """

    names: Sequence[str]
    held_out: Sequence[str]
    samples: int
    guidance_scale: float
    num_inference_steps: int
    seed: int
    batch_size: int = 32


@dataclass(frozen=True)
class Drawn:
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


class Bench:
    """A host with its pictures without guidance and with CFG.

    Raises:
        ValueError: fewer than two samples, or a w of at most 1.
    """

    def __init__(self, host: Host, how: Measurement, judge: Judge) -> None:
        if how.samples < 2 or how.guidance_scale <= 1:
            raise ValueError("a comparison needs at least two samples and a w above 1")
        self.pipe, self.how, self.judge = host.load(), how, judge
        # an even walk through the names, so that few samples still see every category
        step = max(1, len(how.names) // how.samples)
        self.texts, self.seeds = cycle(how.names[::step], how.samples, how.seed)
        self.right, self.named = indices(self.texts, how.names), judge.texts(list(how.names))
        self.real = real_pictures(self.pipe, host.pictures)
        self.none, self.cfg = self.draw(1.0), self.draw(how.guidance_scale)

    def draw(self, guidance_scale: float, method: Attachable | None = None) -> Drawn:
        """All pictures in one way."""
        meter, latents = ScoreMeter(self.judge, self.named, self.real), []
        with counted_rows(self.pipe.unet) as rows:
            for i in range(0, self.how.samples, self.how.batch_size):
                part = slice(i, i + self.how.batch_size)
                drawn = draw(
                    self.pipe, self.texts[part], self.seeds[part], guidance_scale=guidance_scale,
                    num_inference_steps=self.how.num_inference_steps, guide=method,
                )  # fmt: skip
                features = self.judge.images(drawn.images)
                meter.update(drawn.images, features, self.right[part].to(features.device))
                latents.append(drawn.latents)
        passes = sum(rows) / self.how.samples
        return Drawn(meter.compute(), meter.prompt.found(), torch.cat(latents), passes)

    def measure(self, method: Attachable) -> HostScores:
        """One method on this host."""
        how, none, cfg = self.how, self.none, self.cfg
        error = math.nan
        if isinstance(method, Guide):
            error = guidance_error(
                self.pipe, method, how.held_out, seed=how.seed, batch_size=how.batch_size,
                num_inference_steps=how.num_inference_steps,
            ).mean  # fmt: skip
        made, latents = self.draw(how.guidance_scale, method), LatentMeter()
        latents.update(made.latents, none.latents, cfg.latents)
        return HostScores(
            guidance_error=error,
            latent_mse_ratio=latents.compute(),
            gain_kept=_kept(none.scores, cfg.scores, made.scores, "prompt_score"),
            gain_kept_interval=Interval(*gain_kept_interval(none.found, cfg.found, made.found)),
            gain_kept_cosine=_kept(none.scores, cfg.scores, made.scores, "cosine"),
            passes=made.passes,
            scores=made.scores,
        )


def _kept(none: Scores, cfg: Scores, made: Scores, name: str) -> float:
    return gain_kept(*(float(getattr(scores, name)) for scores in (none, cfg, made)))
