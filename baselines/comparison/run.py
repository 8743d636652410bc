"""The comparison: all methods are trained and measured alike, and results are saved on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from baselines import RULES
from baselines.comparison.config import DEFAULT, ComparisonConfig, titles
from baselines.comparison.results import (
    ComparisonResult,
    MethodCost,
    MethodResult,
    MethodRun,
    ModelScores,
    Training,
)
from pilotfish.backbones import Backbone
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelScorer, ModelSource
from pilotfish.evaluation.metrics import LatentMeter, gain_kept, gain_kept_interval, indices
from pilotfish.evaluation.processes import gather_objects, is_main, on_main, process
from pilotfish.evaluation.results import Run, machine, versions
from pilotfish.evaluation.speed import denoiser_flops, speed_up, take_turns, timed_call
from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.noise import prediction_type
from pilotfish.pipelines.sampling import Attachable
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.stages import distill
from pilotfish.training.trainer import TrainingError

BATCH = 8
"""Images in one call where the wall clock is compared."""


class ModelEvaluator:
    """Measures method after method on one model, against the same images.

    Args:
        names: prompts of the images, among which the scorer must find each image's own.
        validation_prompts: prompts of the guidance error.
    """

    def __init__(
        self, source: ModelSource, scorer: Scorer, config: ComparisonConfig, *,
        names: Sequence[str], validation_prompts: Sequence[str],
    ) -> None:  # fmt: skip
        self.pipe, self.config = source.load(), config
        self.trajectories = Trajectories.of_pipeline(
            self.pipe, validation_prompts, seed=config.seed, batch_size=config.batch_size,
            num_inference_steps=config.num_inference_steps, cache=True, process=process(),
        )  # fmt: skip
        self.images = ModelScorer(
            self.pipe, scorer, prompts=names, names=names,
            reference_images=source.reference_images, samples=config.samples, seed=config.seed,
            batch_size=config.batch_size,
        )  # fmt: skip
        self.none = self.images.score(1.0, config.num_inference_steps)
        self.cfg = self.images.score(config.guidance_scale, config.num_inference_steps)

    def measure(self, method: Attachable) -> ModelScores:
        """The scores of one method."""
        none, cfg, config = self.none, self.cfg, self.config
        error = math.nan
        if isinstance(method, Guide):
            error = pipeline_guidance_error(
                self.pipe, method, self.trajectories, gather=gather_objects
            ).mean
        own = self.images.score(config.guidance_scale, config.num_inference_steps, method)
        latents = LatentMeter()
        latents.update(own.latents, none.latents, cfg.latents)
        return ModelScores(
            guidance_error=error,
            latent_mse_ratio=latents.compute(),
            gain_kept=gain_kept(none.scores.top1, cfg.scores.top1, own.scores.top1),
            gain_kept_interval=gain_kept_interval(
                none.hits, cfg.hits, own.hits, prompt=self.images.prompt
            ),
            gain_kept_cosine=gain_kept(none.scores.cosine, cfg.scores.cosine, own.scores.cosine),
            passes=own.passes,
            scores=own.scores,
        )


class Comparison:
    """A comparison in a folder, which is resumed if it is there.

    Several processes train and sample together, and all of them must see the folder.

    Args:
        models: by name, first the base on which all methods are trained.
        folder: for the trainings and ``compare.json``.
        names: prompts of the images, among which the scorer must find each image's own.
        validation_prompts: prompts of the guidance error.
        training: settings of every training, such as another base and its prompts.
        command: the command line, for the result.
        log: called with a line of progress.

    Raises:
        ConfigError: the folder holds a comparison with other settings; or equal seconds are
            wanted without the default.
        ValueError: a name occurs twice.
    """

    def __init__(
        self, config: ComparisonConfig, models: Mapping[str, ModelSource], scorer: Scorer,
        folder: Path, *, names: Sequence[str], validation_prompts: Sequence[str],
        training: Mapping[str, Any], command: str, log: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.config, self.models, self.scorer = config, models, scorer
        self.folder, self.training = folder, training
        self.names, self.validation_prompts = names, validation_prompts
        self.log = log if is_main() else lambda line: None
        self.file = folder / "compare.json"
        indices((), names)  # a name that occurs twice would only be refused after the trainings
        if config.equal_seconds and DEFAULT not in config.methods:
            raise ConfigError(
                f"equal_seconds is the training time of {DEFAULT}; add it to --methods, or use "
                "--no_equal_seconds"
            )
        run = Run(
            command, config.seed, config.samples, config.guidance_scale,
            config.num_inference_steps, machine(), versions(),
        )  # fmt: skip
        # files by their checksum: a path may hold something else by now
        given = sorted((name, _content(value)) for name, value in training.items())
        inputs = repr((list(names), list(validation_prompts), given))
        settings = config.fixed() | {
            "models": " ".join(models), "inputs": f"{crc32(inputs.encode()):08x}",
        }  # fmt: skip
        self.found = ComparisonResult(DEFAULT, {}, {}, settings, run)
        load = ComparisonResult.load
        if before := on_main(lambda: load(self.file) if self.file.is_file() else None):
            if before.settings != settings:
                raise ConfigError(
                    f"{folder} holds a comparison with other settings; use the same settings or "
                    "another --output"
                )
            self.found = before

    def run(self) -> ComparisonResult:
        """Train and measure what is missing.

        Raises:
            ConfigError: the guides of the base do not fit another model.
        """
        if not self.found.methods:
            self._check_models()
        for name, key in self._runs():
            self._train(name, key)
        for model in self.models:
            self._measure(model)
        if any(math.isnan(m.cost.cfg_over_method) for m in self._wanted().values()):
            self.log("timing all methods side by side")
            self.found.methods.update(on_main(self._timed))
            self._save()
        return self.found

    def _check_models(self) -> None:
        """Refuse a model that is no fine-tune of the base before anything is trained."""
        base: dict[str, Any] = {}
        for name, source in self.models.items():
            pipe = source.load()
            own = Backbone.of_pipeline(pipe).signature(prediction_type(pipe.scheduler))
            base = base or own
            if own != base:
                raise ConfigError(
                    f"{name} has another denoiser than the base, so no guide of the base fits it; "
                    "leave it out of --models"
                )

    def _runs(self) -> Iterator[tuple[str, str]]:
        """Method and key of every run. The equal samples come first: they determine the seconds
        of the default."""
        config = self.config
        for budget in ("samples", "seconds") if config.equal_seconds else ("samples",):
            for seed in config.seeds:
                for name in config.methods:
                    if name not in RULES:
                        yield name, f"{budget}-{seed}"
                    elif budget == "samples" and seed == config.seeds[0]:
                        yield name, "free"
        if config.long_train_steps:
            trained = (name for name in config.methods if name not in RULES)
            yield from ((name, f"long-{config.seeds[0]}") for name in trained)

    def _save(self) -> None:
        if is_main():
            self.found.save(self.file)

    # -- training -----------------------------------------------------------------------

    def _train(self, name: str, key: str) -> None:
        """Train unless it is done, and add the run to the result."""
        folder, training = self.folder / name / key, Training()
        if name not in self.found.methods:
            rate = math.nan if name in RULES else self._rate(name)
            self.found.methods[name] = MethodResult(titles()[name], 0, 0.0, MethodCost(), {}, rate)
        if (same := self._same_run(name, key)) is not None:
            training = self.found.methods[name].runs[same].training
        elif name not in RULES:
            if not on_main((folder / "guide").is_dir):
                rate = self.found.methods[name].learning_rate
                steps = on_main(partial(self._steps, name, key))
                self.log(f"training {name}, {key}")
                distill(self._training_config(name, key, steps, int(key.split("-")[1]), rate))
            cost = json.loads(on_main((folder / "training.json").read_text))
            training = Training(cost["steps"], cost["samples"], cost["seconds"])
        self.found.methods[name].runs.setdefault(key, MethodRun(training, {}))
        self._save()

    def _rate(self, name: str) -> float:
        """The learning rate of a method: of several, each is trained for a short while."""
        config, own = self.config, Guide.registry[name].learning_rate
        if len(config.learning_rates) == 1:
            return own * config.learning_rates[0]
        errors: dict[float, float] = {}
        for rate in (own * factor for factor in config.learning_rates):
            key = f"rate-{rate:g}"
            folder = self.folder / name / key
            history, diverged = folder / "history.json", folder / "diverged"
            if not on_main((folder / "guide").is_dir) and not on_main(diverged.is_file):
                self.log(f"training {name}, learning rate {rate:g}")
                steps, seed = config.rate_train_steps, config.seeds[0]
                try:
                    distill(self._training_config(name, key, steps, seed, rate))
                except TrainingError as stopped:
                    self.log(str(stopped))
                    on_main(partial(diverged.write_text, str(stopped)))
            error = math.inf
            if not on_main(diverged.is_file):
                error = json.loads(on_main(history.read_text))[-1]["guidance_error"]
            errors[rate] = error if math.isfinite(error) else math.inf
        return min(errors, key=errors.__getitem__)

    def _training_config(
        self, name: str, key: str, steps: int, seed: int, rate: float
    ) -> DistillConfig:
        config = self.config
        settings: dict[str, Any] = {
            "output": str(self.folder / name / key), "guide_type": name,
            "resume_from_checkpoint": "latest", "max_train_steps": steps, "learning_rate": rate,
            "train_batch_size": config.train_batch_size,
            "mixed_precision": config.mixed_precision,
            "gradient_checkpointing": config.gradient_checkpointing,
            "lr_warmup_steps": max(1, min(100, steps // 8)), "validation_steps": steps,
            "checkpointing_steps": 50, "checkpoints_total_limit": 1, "report_to": "none",
            "seed": seed, "pool": max(512, config.train_batch_size),
            "replay_capacity": min(2048, 32 * config.train_batch_size),
        }  # fmt: skip
        if "trained_scale" in {f.name for f in fields(Guide.registry[name].settings_class)}:
            settings["guide"] = {"trained_scale": config.guidance_scale}
        return DistillConfig(**settings | dict(self.training))

    def _steps(self, name: str, key: str) -> int:
        """The training steps: those of the configuration, or as many as take the seconds of the
        default. A training that has begun keeps its own."""
        budget, seed = key.split("-")
        started = self.folder / name / key / "config.json"
        if started.is_file():
            return int(json.loads(started.read_text())["max_train_steps"])
        if budget == "samples":
            return self.config.max_train_steps
        if budget == "long":
            return self.config.long_train_steps
        own, default = (
            self.found.methods[m].runs[f"samples-{seed}"].training for m in (name, DEFAULT)
        )
        return max(1, round(default.seconds / (own.seconds / own.steps)))

    def _same_run(self, name: str, key: str) -> str | None:
        """The run for equal samples, if it has as many steps as this run for equal seconds, and so
        gives the same guide. That of the default always has."""
        budget, _, seed = key.partition("-")
        if budget != "seconds":
            return None
        other = f"samples-{seed}"
        steps = self.found.methods[name].runs[other].training.steps
        return other if on_main(partial(self._steps, name, key)) == steps else None

    # -- measurement --------------------------------------------------------------------

    def _method(self, name: str, key: str) -> Attachable:
        if name in RULES:
            return RULES[name]()
        return Guide.from_pretrained(self.folder / name / key / "guide")

    def _scores(self, name: str, key: str) -> dict[str, ModelScores]:
        return self.found.methods[name].runs[key].models

    def _measure(self, model: str) -> None:
        """Measure what is missing on one model."""
        missing = [(n, k) for n, k in self._runs() if model not in self._scores(n, k)]
        if not missing and model in self.found.references:
            return
        self.log(f"{model}: no guidance and CFG")
        evaluator = ModelEvaluator(
            self.models[model], self.scorer, self.config, names=self.names,
            validation_prompts=self.validation_prompts,
        )  # fmt: skip
        self.found.references[model] = {
            "none": evaluator.none.scores, "cfg": evaluator.cfg.scores,
        }  # fmt: skip
        for name, key in missing:
            if (same := self._same_run(name, key)) is not None:
                self._scores(name, key)[model] = self._scores(name, same)[model]
            else:
                self.log(f"{model}: {name}, {key}")
                self._scores(name, key)[model] = evaluator.measure(self._method(name, key))
            self._save()

    def _wanted(self) -> dict[str, MethodResult]:
        """The results of the configured methods; others may be left from before."""
        return {name: self.found.methods[name] for name in self.config.methods}

    @torch.no_grad()
    def _timed(self) -> dict[str, MethodResult]:
        """The results with their cost. All methods take turns on the base."""
        config, base = self.config, next(iter(self.models))
        steps, w = config.num_inference_steps, config.guidance_scale
        pipe = self.models[base].load()
        parameters = sum(p.numel() for p in Backbone.of_pipeline(pipe).denoiser.parameters())
        # runs of other seeds may be left from before, and not measured
        keys = {
            name: next(key for key, run in result.runs.items() if base in run.models)
            for name, result in self._wanted().items()
        }
        methods = {name: self._method(name, key) for name, key in keys.items()}
        # with the null prompt adaptive guidance would agree at once
        prompt = self.names[0]
        rounds = take_turns(
            {
                name: partial(timed_call, pipe, method, w, steps, BATCH, prompt)
                for name, method in {"cfg": None, **methods}.items()
            },
            config.rounds,
        )
        none = denoiser_flops(pipe, partial(timed_call, pipe, None, 1.0, 1, 1))
        timed = {}
        for name, method in methods.items():
            result = self.found.methods[name]
            passes = result.runs[keys[name]].models[base].passes
            own, flops = 0, passes / steps * none
            if isinstance(method, Guide):
                own = sum(p.numel() for p in method.parameters())
                flops = denoiser_flops(pipe, partial(timed_call, pipe, method, w, 1, 1))
            cost = MethodCost(passes, flops / none, speed_up(rounds, name))
            timed[name] = replace(result, parameters=own, share=own / parameters, cost=cost)
        return timed


def _content(value: Any) -> Any:
    """The checksum of a file, any other value as it is."""
    is_file = isinstance(value, str) and Path(value).is_file()
    return f"{crc32(Path(value).read_bytes()):08x}" if is_file else value
