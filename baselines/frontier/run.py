"""The measurement: every entry is saved as soon as it is measured, and not measured again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from baselines.frontier.methods import Candidate, candidates
from baselines.frontier.references import figures, kept, kept_images, part_of
from baselines.frontier.results import FrontierEntry, FrontierResult, FrontierRun, Key
from baselines.linear_ag import gram_matrix
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import (
    ModelScorer,
    ModelSource,
    Progress,
    ScoredImages,
    check_methods,
    spread_prompts,
)
from pilotfish.evaluation.results import modules
from pilotfish.evaluation.speed import denoiser_flops, speed_up, take_turns, timed_call
from pilotfish.guides import Guide
from pilotfish.pipelines.loading import use_deterministic_scheduler
from pilotfish.teacher import checksum
from pilotfish.training.config import ConfigError

BATCHES = (1, 8)
"""Images in one call where the wall clock is compared."""
NO_COST: dict[str, Any] = {"flops_over_none": math.nan, "cfg_over_it": {}}


@dataclass(frozen=True)
class FrontierConfig:
    """The images of each point, and which points are measured now."""

    methods: tuple[str, ...] = ()
    """Measure these alone. Default: all."""
    refresh: tuple[int, ...] = ()
    """Measure these numbers of second passes alone. Default: all."""
    samples: int = 1000
    """Images for each point of the guides in their default places, and of delta reuse."""
    baseline_samples: int = 250
    """Images for each point of the other methods, evenly spaced among the same images, and for all
    points of test fine-tunes."""
    guidance_scale: float = 4.0
    """w of the images."""
    num_inference_steps: int = 25
    reference_steps: int = 50
    """Steps of CFG and no guidance, to which guides for few steps are compared."""
    seed: int = 0
    """Of the first image; the others follow."""
    batch_size: int = 64
    """Of the images."""
    trajectories: int = 64
    """CFG trajectories of the base, on which LinearAG is fitted."""
    rounds: int | None = None
    """Rounds of the timing on the base, at the end; 0 for none. Default: 3; with --methods or
    --refresh 0."""

    def __post_init__(self) -> None:
        if not 2 <= self.baseline_samples <= self.samples:
            raise ConfigError(
                f"baseline_samples must be at least 2 and at most samples, not "
                f"{self.baseline_samples} of {self.samples}"
            )
        if not self.guidance_scale > 1:
            raise ConfigError(
                f"guidance_scale must be above 1, where CFG differs from no guidance, not "
                f"{self.guidance_scale:g}"
            )
        for name in ("num_inference_steps", "reference_steps", "trajectories"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def timed_rounds(self) -> int:
        """``rounds``, or its default."""
        if self.rounds is not None:
            return self.rounds
        return 0 if self.methods or self.refresh else 3


def settings_of(config: FrontierConfig) -> dict[str, Any]:
    """The settings that a :class:`FrontierRun` repeats."""
    names = {f.name for f in fields(FrontierRun)}
    return {f.name: getattr(config, f.name) for f in fields(FrontierConfig) if f.name in names}


@dataclass
class Frontier:
    """A frontier in a file, which is resumed if it is there.

    Args:
        models: by name.
        base: name and source of the model on which LinearAG is fitted and the cost is measured.
        guides: ours by name.
        trained: baselines by name.
        names: prompts of the images, among which the scorer must find each image's own.
        train_prompts: of the trajectories that LinearAG is fitted on.
        run: what all entries have in common.
        command: the command line that repeats this part.
        machine: the processor's model and the number of threads.
        file: of the result.
        folder: for the images of no guidance and CFG.
        test_models: names of those for which all points have ``baseline_samples`` images.

    Raises:
        ConfigError: the file holds a frontier with other settings, or a method is unknown, or none
            is measured with a number of second passes.
    """

    config: FrontierConfig
    models: Mapping[str, ModelSource]
    base: tuple[str, ModelSource]
    guides: Mapping[str, Guide]
    trained: Mapping[str, Guide]
    scorer: Scorer
    names: Sequence[str]
    train_prompts: Sequence[str]
    run: FrontierRun
    command: str
    machine: str
    file: Path
    folder: Path
    progress: Progress | None = None
    log: Callable[[str], None] = print
    test_models: Collection[str] = ()
    _gram: torch.Tensor | None = field(default=None, init=False)
    _dropped: set[tuple[str, Key]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.found = FrontierResult(self.run, {})
        if self.file.is_file():
            before = FrontierResult.load(self.file)
            if before.run.settings() != self.run.settings():
                raise ConfigError(
                    f"{self.file} holds a frontier with other settings; use the same settings or "
                    "another --output"
                )
            sizes = before.run.guides | self.run.guides
            run = replace(before.run, versions=self.run.versions, guides=sizes)
            self.found = FrontierResult(run, before.models)
        config = self.config
        every = candidates(
            self.guides, self.trained, self.gram, config.num_inference_steps,
            config.reference_steps,
        )  # fmt: skip
        known = list(dict.fromkeys(one.method for one in every))
        if unknown := sorted(set(config.methods) - set(known)):
            raise ConfigError(
                f"unknown methods: {', '.join(unknown)}; available: {', '.join(known)}"
            )
        counts = {int(one.refresh) for one in every if self._is_named(one) and one.refresh >= 0}
        if unmeasured := sorted(set(config.refresh) - counts):
            raise ConfigError(
                f"nothing is measured with {', '.join(map(str, unmeasured))} second passes; "
                f"available: {', '.join(map(str, sorted(counts)))}"
            )
        usual = (config.num_inference_steps, config.reference_steps)
        wanted = [one for one in every if self._is_wanted(one)]
        if all(one.steps in usual for one in wanted):  # nothing is compared to more steps
            wanted = [one for one in wanted if one.steps == config.num_inference_steps]
        self.candidates = wanted

    def _is_wanted(self, one: Candidate) -> bool:
        config = self.config
        if one.method in ("none", "cfg"):  # measured anyway
            return True
        return self._is_named(one) and (not config.refresh or one.refresh in config.refresh)

    def _is_named(self, one: Candidate) -> bool:
        return not self.config.methods or one.method in self.config.methods

    def measure(self) -> FrontierResult:
        """Measure what is missing."""
        for name, guide in {**self.guides, **self.trained}.items():
            self._forget_changed(f"guide {name}", checksum(guide))
        for model in self.models:
            self._measure(model)
        if self.config.timed_rounds and self.base[0] in self.found.models:
            self._measure_cost()
        return self.found

    def save(self) -> None:
        """Write the result, with what other commands have added to the file since it was read."""
        if self.file.is_file():
            now = FrontierResult.load(self.file)
            if now.run.cost_command and not self.found.run.cost_command:
                self._note_cost(now.run.cost_command, now.run.cost_machine)
            for name, weights in now.run.weights.items():
                self.found.run.weights.setdefault(name, weights)
            for name, size in now.run.guides.items():
                self.found.run.guides.setdefault(name, size)
            for model, entries in now.models.items():
                for entry in entries:
                    dropped = (model, entry.key) in self._dropped
                    if not dropped and self.found.find(model, entry.key) is None:
                        self.found.put(model, entry)
        self.found.save(self.file)

    def _note_cost(self, command: str, machine: str) -> None:
        run = replace(self.found.run, cost_command=command, cost_machine=machine)
        self.found = replace(self.found, run=run)

    # -- images ---------------------------------------------------------------------------

    def _measure(self, model: str) -> None:
        """Measure what is missing on one model."""
        pipe = self._load(self.models[model])
        weights = _weights(pipe)
        self._forget_changed(f"model {model}", weights)
        missing = [one for one in self.candidates if self.found.find(model, one.key) is None]
        if not missing:
            return
        unfitted = [one for one in missing if not one.method.startswith("linear-ag")]
        check_methods(pipe, [one.make() for one in unfitted])
        config = self.config
        samples = config.baseline_samples if model in self.test_models else config.samples
        whole = ModelScorer(
            pipe, self.scorer, prompts=self.names, names=self.names,
            reference_images=self.models[model].reference_images, samples=samples,
            seed=config.seed, batch_size=config.batch_size,
        )  # fmt: skip
        every = samples // config.baseline_samples
        part = copy(whole)
        chosen = slice(0, every * config.baseline_samples, every)
        part.texts, part.seeds = whole.texts[chosen], whole.seeds[chosen]
        part.prompt = whole.prompt[chosen]

        reference_images = None
        if whole.reference is not None:  # by content: a clone in another folder has the same
            reference_images = sha256(whole.reference.cpu().numpy().tobytes()).hexdigest()

        def reference(method: str, steps: int) -> ScoredImages:
            w = 1.0 if method == "none" else config.guidance_scale
            facts = {
                "weights": weights, "scorer": checksum(self.scorer.model), "w": w, "steps": steps,
                "prompts": whole.texts, "seeds": whole.seeds,
                "reference_images": reference_images,
            }  # fmt: skip
            return kept_images(
                self.folder / model / f"{method}-{steps}.safetensors",
                facts,
                partial(whole.score, w, steps, None, self.progress, f"{model}: {method}, {steps}"),
            )

        for one in missing:
            few = one.steps not in (config.num_inference_steps, config.reference_steps)
            steps = config.reference_steps if few else one.steps
            none, cfg = reference("none", steps), reference("cfg", steps)
            if one.method in ("none", "cfg"):
                own, images = {"none": none, "cfg": cfg}[one.method], whole
            else:
                images = whole if one.whole else part
                label = f"{model}: {one.method}, {one.setting or one.refresh}, {one.steps} steps"
                w = one.scale(config.guidance_scale)
                own = images.score(w, one.steps, one.make(), self.progress, label)
                if not one.whole:
                    none, cfg = (part_of(x, every, config.baseline_samples) for x in (none, cfg))
            entry = FrontierEntry(
                method=one.method, refresh=one.refresh, steps=one.steps, seed=config.seed,
                command=self.command, machine=self.machine, setting=one.setting, **NO_COST,
                **figures(own, none, cfg, images.prompt),
            )  # fmt: skip
            self.found.put(model, entry)
            self.save()

    def _load(self, source: ModelSource) -> Any:
        pipe = source.load()
        use_deterministic_scheduler(pipe)
        return pipe

    def _forget_changed(self, name: str, weights: str) -> None:
        """Drop the entries of a model or guide (``name`` says which) whose weights are others."""
        known, models = self.found.run.weights, self.found.models
        if known.get(name, weights) != weights:
            self.log(f"{name} has changed; it is measured again")
            kind, _, own = name.partition(" ")
            fitted = kind == "model" and own == self.base[0]
            for model, entries in models.items():
                gone = [
                    entry
                    for entry in entries
                    if own == (model if kind == "model" else entry.method)
                    or (fitted and entry.method.startswith("linear-ag"))
                ]
                self._dropped |= {(model, entry.key) for entry in gone}
                models[model] = [entry for entry in entries if entry not in gone]
        known[name] = weights

    def gram(self) -> torch.Tensor:
        """What LinearAG is fitted to, on the base."""
        if self._gram is None:
            config, pipe = self.config, self._load(self.base[1])
            prompts, _ = spread_prompts(self.train_prompts, config.trajectories, config.seed)
            same: dict[str, Any] = {
                "seed": config.seed, "guidance_scale": config.guidance_scale,
                "num_inference_steps": config.num_inference_steps,
            }  # fmt: skip

            def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
                self.log("fitting LinearAG on the base")
                found = gram_matrix(pipe, prompts, batch_size=config.batch_size, **same)
                return {"gram": found.cpu()}, {}

            facts = same | {"prompts": prompts, "weights": _weights(pipe)}
            self._gram = kept(self.folder / "linear-ag.safetensors", facts, make)[0]["gram"]
        return self._gram

    # -- cost -----------------------------------------------------------------------------

    @torch.no_grad()
    def _measure_cost(self) -> None:
        """FLOPs, and the wall clock of all methods in turns, on the base; other models have the
        same where they take as many passes."""
        base, before = self.base[0], {k: [*v] for k, v in self.found.models.items()}
        measured = [(one, self.found.find(base, one.key)) for one in self.candidates]
        points = [(one, entry) for one, entry in measured if entry is not None]
        if not all(entry.has_cost for _, entry in points):
            self.log("timing all methods side by side")
            pipe, w, prompt = self._load(self.base[1]), self.config.guidance_scale, self.names[0]
            calls = {
                repr(one.key): partial(
                    timed_call, pipe, one.make(), one.scale(w), one.steps, prompt=prompt
                )
                for one, _ in points
            }
            cfg = partial(timed_call, pipe, None, w, self.config.num_inference_steps, prompt=prompt)
            rounds = {
                batch: take_turns(
                    {name: partial(call, batch=batch) for name, call in calls.items()}
                    | {"cfg": partial(cfg, batch=batch)},
                    self.config.timed_rounds,
                )
                for batch in BATCHES
            }
            once = denoiser_flops(pipe, partial(timed_call, pipe, None, 1.0, 1, 1, prompt))
            for one, entry in points:
                name = repr(one.key)
                work = entry.passes * once
                if one.method in self.guides or one.method in self.trained:
                    work = denoiser_flops(pipe, partial(calls[name], batch=1))
                cost: dict[str, Any] = {
                    "flops_over_none": work / (one.steps * once),
                    "cfg_over_it": {str(b): speed_up(r, name) for b, r in rounds.items()},
                }
                self.found.put(base, replace(entry, **cost))
            self._note_cost(self.command, self.machine)
        for model, entries in self.found.models.items():
            for i, entry in enumerate(entries):
                same = self.found.find(base, entry.key)
                if same is not None and math.isclose(same.passes, entry.passes):
                    cost = {name: getattr(same, name) for name in NO_COST}
                    self.found.models[model][i] = replace(entry, **cost)
        if self.found.models != before:
            self.save()


def _weights(pipe: Any) -> str:
    """The checksums of all networks of a pipeline."""
    return " ".join(checksum(module)[:16] for _, module in sorted(modules(pipe).items()))
