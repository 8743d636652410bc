"""Scores against a setting: the number of sampling steps, or the guidance scale.

Without guidance, with CFG, and with any number of methods, from the same noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelScorer, ModelSource, Progress, check_methods
from pilotfish.evaluation.processes import on_main
from pilotfish.evaluation.results import (
    CurveResult,
    GuideSize,
    PartialResults,
    Point,
    Run,
    machine,
    modules,
    versions,
)
from pilotfish.evaluation.run import as_json, dtype_name, frames_setting
from pilotfish.evaluation.speed import take_turns, timed_call
from pilotfish.guides import Guide
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.loading import use_deterministic_scheduler
from pilotfish.pipelines.sampling import Attachable
from pilotfish.refresh import RefreshSteps, check_refresh
from pilotfish.teacher import checksum

TIMED_BATCH = 8
"""Images in one call where the wall clock is compared."""


@dataclass(frozen=True)
class Method:
    """``none``, ``cfg``, a guide or rule, or several guides that were each distilled to another
    number of steps."""

    guides: Mapping[int | None, Attachable | None]
    unguided: bool = False
    refresh: RefreshSteps | None = None

    @classmethod
    def of(cls, guides: Sequence[Attachable], refresh: RefreshSteps | None = None) -> Method:
        """A guide that was distilled to few steps serves those, any other one all.

        Raises:
            ValueError: two of them serve the same number of steps.
        """
        found: dict[int | None, Attachable | None] = {}
        for guide in guides:
            times = guide.times if isinstance(guide, Guide) else None
            steps = None if times is None else len(times)
            if steps in found:
                raise ValueError(f"two guides of one name for {steps or 'any number of'} steps")
            found[steps] = guide
        return cls(found, refresh=refresh)

    def serves(self, steps: int) -> bool:
        """Whether it can sample with this number of steps."""
        return steps in self.guides or None in self.guides

    def guide(self, steps: int) -> Attachable | None:
        """The guide or rule for this number of steps."""
        return self.guides[steps] if steps in self.guides else self.guides[None]

    def attachable(self, steps: int) -> Attachable | None:
        """What is attached for this number of steps."""
        guide = self.guide(steps)
        return Refreshed(guide, self.refresh) if isinstance(guide, Guide) else guide


@dataclass(frozen=True)
class Setting:
    """One value of the curve."""

    value: str
    guidance_scale: float
    num_inference_steps: int


def score_steps(
    models: Mapping[str, ModelSource], methods: Mapping[str, Sequence[Attachable]],
    steps: Sequence[int], *, guidance_scale: float = 4.0, rounds: int = 3, **given: Any,
) -> CurveResult:  # fmt: skip
    """Scores of every method with every number of steps, on every model. All of them use
    the deterministic scheduler (DDIM or Euler), whatever scheduler a model comes with.

    Args:
        models: by name, the base first.
        methods: by name; ``none`` and ``cfg`` are always measured. Several guides make one
            method if each was distilled to another number of steps.
        rounds: of the wall clock.
        given: see :func:`_score`.

    Raises:
        ValueError: no model, no number of steps, no round, a w of at most 1; and as
            :class:`ModelScorer`.
        GuideError: ``refresh`` is invalid, or a guide does not fit a model.
    """
    if not steps or min(steps) < 1:
        raise ValueError("at least one number of steps is needed, each at least 1")
    if rounds < 1:
        raise ValueError(f"at least one round is needed, not {rounds}")
    if guidance_scale <= 1:
        raise ValueError(f"CFG is no guidance at w = {guidance_scale:g}; use a larger one")
    settings = [Setting(str(n), guidance_scale, n) for n in sorted(set(steps))]
    return _score("num_inference_steps", models, methods, settings, rounds=rounds, **given)


def score_guidance_scales(
    models: Mapping[str, ModelSource], methods: Mapping[str, Sequence[Attachable]],
    guidance_scales: Sequence[float], *, num_inference_steps: int = 25, **given: Any,
) -> CurveResult:  # fmt: skip
    """The same at every guidance scale, with the scheduler that a model comes with.

    Raises:
        ValueError: no model, no guidance scale, a guide for another number of steps; and as
            :class:`ModelScorer`.
        GuideError: ``refresh`` is invalid, or a guide does not fit a model.
    """
    if not guidance_scales:
        raise ValueError("at least one guidance scale is needed")
    for name, guides in methods.items():
        if not Method.of(guides).serves(num_inference_steps):
            raise ValueError(f"{name} was distilled to another number than {num_inference_steps}")
    settings = [Setting(f"{w:g}", w, num_inference_steps) for w in sorted(set(guidance_scales))]
    return _score("guidance_scale", models, methods, settings, rounds=0, **given)


def _score(
    setting: str,
    models: Mapping[str, ModelSource],
    methods: Mapping[str, Sequence[Attachable]],
    settings: Sequence[Setting],
    *,
    names: Sequence[str],
    command: str,
    rounds: int,
    samples: int = 1000,
    seed: int = 0,
    refresh: RefreshSteps | None = None,
    num_frames: int | None = None,
    batch_size: int = 32,
    scorer: Scorer | None = None,
    unfinished: str | Path | None = None,
    progress: Progress | None = None,
) -> CurveResult:
    """See :func:`score_steps`.

    Args:
        names: prompts of the images, among which the scorer must find the right one.
        command: the command line that repeats the run.
        samples: images for each point.
        refresh: steps of the guides that run both passes: how many, what ratio, or which. Left
            out: the ratio that each guide names.
        num_frames: of a video; left out, the pipeline's own number.
        unfinished: file of the points that are finished; the same call resumes from it. To be
            deleted when the result is saved.
        progress: called after every batch.
    """
    if not models:
        raise ValueError("there is no model to evaluate on")
    refresh = refresh if refresh is None else check_refresh(refresh)
    scorer, parts = scorer or Scorer.bundled(), PartialResults(unfinished)
    all_methods = {"none": Method({None: None}, unguided=True), "cfg": Method({None: None})}
    all_methods |= {name: Method.of(guides, refresh) for name, guides in methods.items()}
    facts: dict[str, Any] = {
        "names": list(names), "samples": samples, "seed": seed, "refresh": refresh,
        **frames_setting(num_frames),
    }  # fmt: skip
    guides = [guide for method in all_methods.values() for guide in method.guides.values()]
    # before a model changes the precision of a guide
    descriptions = {id(guide): _describe(guide) for guide in guides if unfinished is not None}
    by_model: dict[str, dict[str, dict[str, Point]]] = {}
    for model, source in models.items():
        pipe = _load(source, setting)
        images = ModelScorer(
            pipe, scorer, prompts=names, names=names, reference_images=source.reference_images,
            samples=samples, seed=seed, batch_size=batch_size, num_frames=num_frames,
        )  # fmt: skip
        served = {
            id(method.guide(one.num_inference_steps)): method.attachable(one.num_inference_steps)
            for method in all_methods.values()
            for one in _of_method(method, settings, setting)
        }
        check_methods(pipe, served.values())
        facts |= {
            "weights": parts.checksums({**modules(pipe), "scorer": scorer.model}),
            "reference_images": source.reference_images,
        }
        by_model[model] = {name: {} for name in all_methods}
        for name, method in all_methods.items():
            for one in _of_method(method, settings, setting):
                w, steps = 1.0 if method.unguided else one.guidance_scale, one.num_inference_steps
                guide = method.guide(steps)
                title = f"{model}: {name}, {setting} {one.value}"
                attachable = method.attachable(steps)
                measure = partial(_point, images, w, steps, attachable, progress, title)
                of_point = {"w": w, "steps": steps, "method": descriptions.get(id(guide))}
                by_model[model][name][one.value] = parts.get(Point, facts | of_point, measure)
    base = _load(next(iter(models.values())), setting)
    sizes = {
        f"{name}-{n}" if n else name: GuideSize.of(guide, base, name)
        for name, method in all_methods.items()
        for n, guide in method.guides.items()
        if isinstance(guide, Guide)
    }
    last = settings[-1]
    run = Run(
        command, seed, samples, last.guidance_scale, last.num_inference_steps, machine(),
        versions(), dtype_name(base), refresh if refresh is None else as_json(refresh),
    )  # fmt: skip
    times = on_main(partial(_wall_clock, base, all_methods, settings, rounds, names[0], num_frames))
    return CurveResult(setting, by_model, times, sizes, run)


def _point(
    images: ModelScorer, w: float, steps: int, guide: Attachable | None,
    progress: Progress | None, title: str,
) -> Point:  # fmt: skip
    found = images.score(w, steps, guide, progress, title)
    return Point(found.passes, found.scores)


def _of_method(method: Method, settings: Sequence[Setting], setting: str) -> list[Setting]:
    """The settings that a method is measured at."""
    if setting == "guidance_scale" and method.unguided:
        return [Setting("1", 1.0, settings[0].num_inference_steps)]
    return [one for one in settings if method.serves(one.num_inference_steps)]


def _load(source: ModelSource, setting: str) -> Any:
    pipe = source.load()
    if setting == "num_inference_steps":
        use_deterministic_scheduler(pipe)
    return pipe


def _describe(guide: Attachable | None) -> str:
    """The type of a guide or rule, its settings, its weights."""
    if isinstance(guide, Guide):
        return f"{type(guide).__name__} {sorted(guide.config.items())} {checksum(guide)}"
    return f"{type(guide).__name__} {sorted(vars(guide).items()) if guide else None}"


@torch.no_grad()
def _wall_clock(
    pipe: Any, methods: Mapping[str, Method], settings: Sequence[Setting], rounds: int,
    prompt: str, num_frames: int | None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """All methods take turns, so that other load on the machine affects all alike."""
    if not rounds:
        return {}
    calls = {
        (name, one.value): partial(
            timed_call, pipe, method.attachable(one.num_inference_steps),
            1.0 if method.unguided else one.guidance_scale, one.num_inference_steps,
            TIMED_BATCH, prompt, num_frames=num_frames,
        )
        for name, method in methods.items()
        for one in settings
        if method.serves(one.num_inference_steps)
    }  # fmt: skip
    times = take_turns(calls, rounds)
    longest = ("cfg", settings[-1].value)
    found: dict[str, dict[str, float]] = {name: {} for name in methods}
    for name, value in calls:
        found[name][value] = statistics.median(r[name, value] / r[longest] for r in times)
    return found
