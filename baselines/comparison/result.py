"""What a comparison found: for each method what it costs, and how it does on each host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from pilotfish.evaluation.results import Interval, Run, Saved, Scores


@dataclass(frozen=True)
class Training:
    """What a training took. Nothing, where a method needs none."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class HostScores:
    """A method on one host, against that host's own CFG.

    Attributes:
        guidance_error: mean over w; not a number for a method without a network.
        latent_mse_ratio: MSE(method, cfg) / MSE(unguided, cfg) of final latents.
        gain_kept: (method - none) / (cfg - none) in top-1 accuracy.
        gain_kept_interval: its 95 % interval, over the choice of pictures.
        gain_kept_cosine: the same in mean cosine.
        passes: of the denoiser for one picture.
        scores: of the pictures.
    """

    guidance_error: float
    latent_mse_ratio: float
    gain_kept: float
    gain_kept_interval: Interval
    gain_kept_cosine: float
    passes: float
    scores: Scores


@dataclass(frozen=True)
class MethodRun:
    """One training of a method, and what came of it on each host."""

    training: Training
    hosts: dict[str, HostScores]


@dataclass(frozen=True)
class MethodCost:
    """What a picture costs; not a number before it was measured.

    Attributes:
        passes: of the denoiser.
        flops_over_plain: FLOPs over those of one pass a step without guidance.
        cfg_over_method: wall clock at batch 8, the median over rounds in which all methods
            take turns.
    """

    passes: float = math.nan
    flops_over_plain: float = math.nan
    cfg_over_method: float = math.nan


@dataclass(frozen=True)
class MethodResult:
    """One method.

    Attributes:
        parameters: of what is trained.
        share: of the denoiser's parameters.
        runs: by budget and seed: ``samples-0`` has seen as many samples as all others,
            ``seconds-0`` trained as many seconds as the default; ``free`` needs no training.
    """

    title: str
    parameters: int
    share: float
    cost: MethodCost
    runs: dict[str, MethodRun]


@dataclass(frozen=True)
class Comparison(Saved):
    """All of it.

    Attributes:
        default: the method that is the library's default.
        methods: by name.
        references: for each host the scores without guidance and with CFG.
        plan: the settings, as text.
    """

    default: str
    methods: dict[str, MethodResult]
    references: dict[str, dict[str, Scores]]
    plan: dict[str, str]
    run: Run

    @property
    def base(self) -> str:
        """The host on which the methods were trained."""
        return next(iter(self.references))

    @property
    def fine_tunes(self) -> list[str]:
        """The hosts that none of them has seen."""
        return list(self.references)[1:]

    @property
    def budgets(self) -> list[str]:
        """Those that some method was trained and measured with."""
        keys = (
            key.split("-")[0]
            for method in self.methods.values()
            for key, run in method.runs.items()
            if self._is_measured(run)
        )
        return [b for b in dict.fromkeys(keys) if b != "free"] or ["free"]

    def _is_measured(self, run: MethodRun) -> bool:
        """Whether on every host. One that is not is left from a comparison that was stopped, and
        gone on with without it."""
        return run.hosts.keys() >= self.references.keys()

    def runs(self, method: str, budget: str) -> list[MethodRun]:
        """The trainings of a method in a budget, those that were measured; what needs none counts
        in every budget."""
        return [
            run
            for key, run in self.methods[method].runs.items()
            if key.split("-")[0] in (budget, "free") and self._is_measured(run)
        ]

    def mean(self, method: str, budget: str, value: Callable[[MethodRun], float]) -> float:
        """The mean over those trainings; not a number where there is none."""
        runs = self.runs(method, budget)
        return fmean(map(value, runs)) if runs else math.nan

    def kept(self, method: str, host: str, budget: str) -> float:
        """The gain kept on a host, mean over trainings; not a number where it is missing."""
        return self.mean(method, budget, lambda run: run.hosts[host].gain_kept)

    def kept_on_fine_tunes(self, method: str, budget: str) -> float:
        """The gain kept, mean over fine-tunes and trainings."""
        found = [self.kept(method, host, budget) for host in self.fine_tunes]
        return fmean(found) if found else math.nan
