"""The result of a comparison: the cost of each method, and its scores on each model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from pilotfish.evaluation.results import Interval, Run, Saved, Scores


@dataclass(frozen=True)
class Training:
    """The size of a training; zero for a method without training."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ModelScores:
    """A method on one model, relative to the model's own CFG.

    Attributes:
        guidance_error: mean over w; NaN for a method without a network.
        latent_mse_ratio: MSE(method, cfg) / MSE(none, cfg) of final latents.
        gain_kept: (method - none) / (cfg - none) in top-1 accuracy.
        gain_kept_interval: its 95 % interval, over the choice of prompts.
        gain_kept_cosine: the same in mean cosine.
        passes: of the denoiser for one image.
        scores: of the images.
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
    """One training of a method, and its scores by model."""

    training: Training
    models: dict[str, ModelScores]


@dataclass(frozen=True)
class MethodCost:
    """The cost of an image; NaN before it is measured.

    Attributes:
        passes: of the denoiser.
        flops_over_none: FLOPs relative to one pass a step.
        cfg_over_method: wall clock at batch 8, the median over rounds in which all methods take
            turns.
    """

    passes: float = math.nan
    flops_over_none: float = math.nan
    cfg_over_method: float = math.nan


@dataclass(frozen=True)
class MethodResult:
    """One method.

    Attributes:
        parameters: that are trained.
        share: of the denoiser's parameters.
        runs: by budget and training seed: ``samples-0`` is trained on as many samples as all
            methods, ``seconds-0`` for as many seconds as the default, ``long-0`` on more samples;
            ``free`` is not trained.
        learning_rate: peak of its trainings; NaN without a training.
    """

    title: str
    parameters: int
    share: float
    cost: MethodCost
    runs: dict[str, MethodRun]
    learning_rate: float = math.nan


@dataclass(frozen=True)
class ComparisonResult(Saved):
    """All methods.

    Attributes:
        default: the library's default guide.
        methods: by name.
        references: by model, the scores of ``none`` and ``cfg``.
        settings: the settings that all figures depend on, as text.
    """

    default: str
    methods: dict[str, MethodResult]
    references: dict[str, dict[str, Scores]]
    settings: dict[str, str]
    run: Run

    @property
    def base(self) -> str:
        """The model that the methods were trained on."""
        return next(iter(self.references))

    @property
    def fine_tunes(self) -> list[str]:
        """The other models."""
        return list(self.references)[1:]

    @property
    def budgets(self) -> list[str]:
        """The budgets of the measured runs."""
        keys = (
            key.split("-")[0]
            for method in self.methods.values()
            for key, run in method.runs.items()
            if self._is_measured(run)
        )
        return [b for b in dict.fromkeys(keys) if b != "free"] or ["free"]

    def _is_measured(self, run: MethodRun) -> bool:
        """Whether a run is measured on every model. One that is not was left by a comparison that
        was stopped and resumed with other methods, budgets or seeds."""
        return run.models.keys() >= self.references.keys()

    def runs(self, method: str, budget: str) -> list[MethodRun]:
        """The measured runs of a method in a budget; a run without training is in every budget."""
        return [
            run
            for key, run in self.methods[method].runs.items()
            if key.split("-")[0] in (budget, "free") and self._is_measured(run)
        ]

    def mean(self, method: str, budget: str, value: Callable[[MethodRun], float]) -> float:
        """The mean over these runs; NaN if there are none."""
        runs = self.runs(method, budget)
        return fmean(map(value, runs)) if runs else math.nan

    def gain_kept(self, method: str, model: str, budget: str) -> float:
        """The CFG gain kept on a model, mean over runs."""
        return self.mean(method, budget, lambda run: run.models[model].gain_kept)

    def gain_kept_on_fine_tunes(self, method: str, budget: str) -> float:
        """The CFG gain kept, mean over fine-tunes and runs."""
        found = [self.gain_kept(method, model, budget) for model in self.fine_tunes]
        return fmean(found) if found else math.nan

    def guidance_error(self, method: str, budget: str, models: list[str]) -> float:
        """The guidance error, mean over models and runs; NaN without a model."""
        found = [
            self.mean(method, budget, lambda run, m=m: run.models[m].guidance_error)  # type: ignore[misc]
            for m in models
        ]
        return fmean(found) if found else math.nan

    def ranked(self, budget: str) -> list[str]:
        """Methods with a run in the budget, by the gain kept on the fine-tunes."""
        names = [name for name in self.methods if self.runs(name, budget)]
        return sorted(names, key=lambda name: -self.gain_kept_on_fine_tunes(name, budget))
