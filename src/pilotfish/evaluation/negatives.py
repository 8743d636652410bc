"""Negative prompts with a guide, against those with CFG.

Held-out prompts are paired with negative prompts. A guide is measured against CFG with the same
pair: once conditioned on the negative prompt and once on the null prompt, as a guide that
ignores it. The guidance error with the null prompt is reported with both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelSource, Progress, draw, named_progress
from pilotfish.evaluation.metrics import AgreementMeter, LatentMeter
from pilotfish.evaluation.processes import gather_objects, process, total_batch_size
from pilotfish.evaluation.results import (
    GuideSize,
    NegativeModel,
    NegativeResult,
    PartialResults,
    Run,
    machine,
    modules,
    versions,
)
from pilotfish.evaluation.run import as_json, dtype_name, frames_setting
from pilotfish.guidance_error import GuidanceError, Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.attach import check
from pilotfish.refresh import RefreshSteps, check_refresh

CONDITIONS = ("conditioned", "ignoring", "null", "none", "none_null")


def pairs(prompts: Sequence[str]) -> list[str]:
    """A negative prompt for each prompt: the one half the list further on.

    Raises:
        ValueError: fewer than two prompts, or one that would be its own negative prompt.
    """
    half = len(prompts) // 2
    found = [*prompts[half:], *prompts[:half]]
    if len(prompts) < 2 or any(p == n for p, n in zip(prompts, found, strict=True)):
        raise ValueError("negative prompts are taken from the prompts: two that differ are needed")
    return found


def evaluate_negatives_of_model(
    pipe: Any, guide: Guide, prompts: Sequence[str], negative_prompts: Sequence[str],
    scorer: Scorer, *, seed: int = 0, guidance_scale: float = 4.0, num_inference_steps: int = 25,
    refresh: RefreshSteps = 0, num_frames: int | None = None, batch_size: int = 32,
    progress: Progress | None = None,
) -> NegativeModel:  # fmt: skip
    """Measure one pipeline.

    Args:
        prompts: held out of training; one image each, with a seed of its own.
        negative_prompts: one for each.
        seed: of the first image; the others follow.
        refresh: steps of the guide that run both passes: how many, what ratio, or which.
        num_frames: of a video; left out, the pipeline's own number.
        batch_size: of each process.
        progress: called after every batch.

    Raises:
        ValueError: as :class:`Trajectories`.
        GuideError: the guide does not fit the pipeline.
    """
    report = progress or (lambda what, done, total: None)
    trajectories = partial(
        Trajectories.of_pipeline, pipe, prompts, seed=seed, batch_size=batch_size,
        num_inference_steps=num_inference_steps, process=process(), guidance=guide.guidance,
        num_frames=num_frames,
    )  # fmt: skip

    def error(what: str, walk: Trajectories, *, with_negative: bool = True) -> GuidanceError:
        return pipeline_guidance_error(
            pipe, guide, walk, refresh=refresh, gather=gather_objects, with_negative=with_negative,
            progress=partial(report, f"guidance error, {what}"),
        )  # fmt: skip

    null = error("null prompt", trajectories())
    cfg_walk = trajectories(negative_prompts=negative_prompts, cache=True)
    conditioned = error("negative prompts", cfg_walk)
    ignoring = error("negative prompts ignored", cfg_walk, with_negative=False)
    report("images", 0, len(prompts))
    method, reference = Refreshed(guide, refresh), Reference(guide.guidance)
    latents, agreement = LatentMeter(), {name: AgreementMeter() for name in CONDITIONS}
    batch_size = total_batch_size(batch_size)
    for i in range(0, len(prompts), batch_size):
        part = slice(i, i + batch_size)
        texts, negative = list(prompts[part]), list(negative_prompts[part])
        sampled = partial(
            draw, pipe, texts, range(seed + i, seed + i + len(texts)),
            guidance_scale=guidance_scale, num_inference_steps=num_inference_steps,
            num_frames=num_frames,
        )  # fmt: skip
        cfg = sampled(guide=reference, negative_prompts=negative)
        plain_cfg = sampled(guide=reference)
        none = sampled(guidance_scale=1.0)
        with_negative = sampled(guide=method, negative_prompts=negative)
        with_null = sampled(guide=method)
        compared = {
            "conditioned": (with_negative, cfg), "ignoring": (with_null, cfg),
            "null": (with_null, plain_cfg), "none": (none, cfg), "none_null": (none, plain_cfg),
        }  # fmt: skip
        for name, (guided, by_cfg) in compared.items():
            both = guided.images, by_cfg.images
            agreement[name].update(*both, *map(scorer.images, both))
        latents.update(with_negative.latents, with_null.latents, cfg.latents)
        report("images", i + len(texts), len(prompts))
    own = null.mean or math.nan
    return NegativeModel(
        null, conditioned, ignoring, conditioned.mean / own, ignoring.mean / own,
        latents.compute(), {name: meter.compute() for name, meter in agreement.items()},
    )  # fmt: skip


def evaluate_negatives(
    models: Mapping[str, ModelSource], guide: Guide, prompts: Sequence[str], *, guide_name: str,
    command: str, scorer: Scorer | None = None, seed: int = 0, guidance_scale: float = 4.0,
    num_inference_steps: int = 25, refresh: RefreshSteps = 0, num_frames: int | None = None,
    batch_size: int = 32, unfinished: str | Path | None = None, progress: Progress | None = None,
) -> NegativeResult:  # fmt: skip
    """Measure a guide on every model, each prompt with the negative prompt of :func:`pairs`.

    Args:
        refresh: see :func:`evaluate_negatives_of_model`.
        num_frames: likewise.
        unfinished: file of the models that are finished; the same call resumes from it. To be
            deleted when the result is saved.

    Raises:
        ValueError: no model, prompts that make no pairs, a w of at most 1.
        GuideError: ``refresh`` is invalid, or the guide does not fit a model.
    """
    if not models:
        raise ValueError("there is no model to evaluate on")
    if guidance_scale <= 1:
        raise ValueError(f"a negative prompt has no effect at w = {guidance_scale:g}")
    scorer, negative_prompts = scorer or Scorer.bundled(), pairs(prompts)
    refresh, _ = check_refresh(refresh), total_batch_size(batch_size)
    parts, results, size, dtype = PartialResults(unfinished), {}, None, "float32"
    same: dict[str, Any] = {
        "seed": seed, "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps,
        "refresh": as_json(refresh),
    }  # fmt: skip
    weights = parts.checksums({"guide": guide})  # before a model changes its precision
    for name, source in models.items():
        pipe = source.load()
        check(guide, pipe)
        size, dtype = size or GuideSize.of(guide, pipe, guide_name), dtype_name(pipe)
        measure = partial(
            evaluate_negatives_of_model, pipe, guide, prompts, negative_prompts, scorer,
            num_frames=num_frames, batch_size=batch_size,
            progress=named_progress(progress, name), **same,
        )  # fmt: skip
        networks = parts.checksums({**modules(pipe), "scorer": scorer.model})
        facts = same | {"prompts": list(prompts), "weights": weights | networks}
        facts |= frames_setting(num_frames)
        results[name] = parts.get(NegativeModel, facts, measure)
    assert size is not None
    run = Run(command, samples=len(prompts), machine=machine(), versions=versions(),
              dtype=dtype, guidance=str(guide.guidance), **same)  # fmt: skip
    return NegativeResult(results, size, run)
