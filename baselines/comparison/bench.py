"""One host, on which method after method is measured against the same pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from baselines.comparison.result import HostScores
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelScorer, ModelSource
from pilotfish.evaluation.metrics import LatentMeter, gain_kept, gain_kept_interval
from pilotfish.evaluation.processes import gather_objects, process
from pilotfish.evaluation.results import Scores
from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import Attachable


@dataclass(frozen=True)
class Measurement:
    """How every method is measured.

    Attributes:
        names: what is drawn, and among which the scorer must find the right one.
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


class Bench:
    """A host with its pictures without guidance and with CFG.

    Raises:
        ValueError: a w of at most 1; and what :class:`ModelScorer` raises.
    """

    def __init__(self, host: ModelSource, how: Measurement, scorer: Scorer) -> None:
        if how.guidance_scale <= 1:
            raise ValueError(f"there is no gain to keep at w = {how.guidance_scale:g}; take more")
        self.pipe, self.how = host.load(), how
        self.trajectories = Trajectories.of_pipeline(
            self.pipe, how.held_out, seed=how.seed, batch_size=how.batch_size, cache=True,
            num_inference_steps=how.num_inference_steps, process=process(),
        )  # fmt: skip
        self.gallery = ModelScorer(
            self.pipe, scorer, prompts=how.names, names=how.names,
            reference_images=host.reference_images, samples=how.samples, seed=how.seed,
            batch_size=how.batch_size,
        )  # fmt: skip
        self.none = self.gallery.score(1.0, how.num_inference_steps)
        self.cfg = self.gallery.score(how.guidance_scale, how.num_inference_steps)

    def measure(self, method: Attachable) -> HostScores:
        """One method on this host."""
        how, none, cfg = self.how, self.none, self.cfg
        error = math.nan
        if isinstance(method, Guide):
            error = pipeline_guidance_error(
                self.pipe, method, self.trajectories, gather=gather_objects
            ).mean
        made = self.gallery.score(how.guidance_scale, how.num_inference_steps, method)
        latents = LatentMeter()
        latents.update(made.latents, none.latents, cfg.latents)
        return HostScores(
            guidance_error=error,
            latent_mse_ratio=latents.compute(),
            gain_kept=_kept(none.scores, cfg.scores, made.scores, "top1"),
            gain_kept_interval=gain_kept_interval(
                none.hits, cfg.hits, made.hits, prompt=self.gallery.prompt
            ),
            gain_kept_cosine=_kept(none.scores, cfg.scores, made.scores, "cosine"),
            passes=made.passes,
            scores=made.scores,
        )


def _kept(none: Scores, cfg: Scores, made: Scores, name: str) -> float:
    return gain_kept(*(float(getattr(scores, name)) for scores in (none, cfg, made)))
