"""The evaluation: a guide on a base and, unchanged, on its fine-tunes.

Each model is measured against its own CFG, from the same noise in all guidance modes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pilotfish.backbones import Backbone
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import (
    ModelScorer,
    ModelSource,
    Progress,
    draw_modes,
    named_progress,
)
from pilotfish.evaluation.metrics import (
    AgreementMeter,
    ClipScore,
    InceptionFID,
    LatentMeter,
    gain_kept,
    gain_kept_interval,
)
from pilotfish.evaluation.processes import gather_objects, on_main, process, total_batch_size
from pilotfish.evaluation.results import (
    Cost,
    GuideSize,
    ModelResult,
    PartialResults,
    Result,
    Run,
    machine,
    modules,
    versions,
)
from pilotfish.evaluation.speed import measure_cost
from pilotfish.guidance import GuidanceMode
from pilotfish.guidance_error import SCALES, Trajectories, pipeline_guidance_error
from pilotfish.guidances import CFG
from pilotfish.guides import Guide
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.attach import check
from pilotfish.refresh import RefreshSteps, check_refresh

NO_REFERENCE = "Inception FID needs a folder of reference images of each model"


def evaluate_model(
    pipe: Any,
    guide: Guide,
    *,
    prompts: Sequence[str],
    names: Sequence[str],
    reference_images: str | Path | None,
    validation_prompts: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
    guidance_scale: float = 4.0,
    num_inference_steps: int = 25,
    refresh: RefreshSteps = 0,
    num_frames: int | None = None,
    batch_size: int = 32,
    scorer: Scorer | None = None,
    guidance_scales: Sequence[float] = SCALES,
    inception_weights: str | Path | None = None,
    clip: str | Path | None = None,
    progress: Progress | None = None,
) -> ModelResult:
    """Measure one pipeline. Wherever CFG is measured, it is the guidance that the guide was taught.

    Args:
        prompts: prompts of the images; they are among the names.
        names: the names among which the scorer must find the prompt.
        reference_images: folder of real images in the model's style, the reference of
            ``fd_clip``.
        validation_prompts: held out of the guide's training, for the guidance error.
        samples: images in each mode; the prompts are repeated, each time with new seeds.
        seed: of the first image; the others follow.
        refresh: steps of the guide that run both passes: how many, what ratio, or which.
        num_frames: of a video; left out, the pipeline's own number.
        batch_size: of each process.
        scorer: left out: the bundled one.
        guidance_scales: each w of the guidance error.
        inception_weights: if given, Inception FID as well.
        clip: folder of a CLIP; if given, CLIP score as well.
        progress: called after every batch.

    Raises:
        ValueError: a prompt that is no name, fewer than two samples, a wrong path.
        GuideError: the guide does not fit the pipeline.
    """
    _check(samples, guidance_scale)
    model = ModelScorer(
        pipe, scorer or Scorer.bundled(), prompts=prompts, names=names, samples=samples,
        reference_images=reference_images, seed=seed, batch_size=batch_size, num_frames=num_frames,
    )  # fmt: skip
    modes = [mode.value for mode in GuidanceMode]
    scores = {mode: model.meter() for mode in modes}
    further = _further_meters(inception_weights, clip, model.reference)
    agreement = {mode: AgreementMeter() for mode in ("guided", "none")}
    latents = LatentMeter()
    report = progress or (lambda what, done, total: None)
    trajectories = Trajectories.of_pipeline(
        pipe, validation_prompts, guidance_scales=guidance_scales, seed=seed,
        num_inference_steps=num_inference_steps, batch_size=batch_size, process=process(),
        guidance=guide.guidance, num_frames=num_frames,
    )  # fmt: skip
    error = pipeline_guidance_error(
        pipe, guide, trajectories, refresh=refresh, gather=gather_objects,
        progress=partial(report, "guidance error"),
    )  # fmt: skip
    report("images", 0, samples)
    done = 0
    for batches in draw_modes(
        pipe, Refreshed(guide, refresh), model.texts, model.seeds, guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps, batch_size=batch_size,
        reference=Reference(guide.guidance), num_frames=num_frames,
    ):  # fmt: skip
        features = {mode: model.scorer.images(batch.images) for mode, batch in batches.items()}
        for mode, batch in batches.items():
            part = model.prompt[done : done + len(batch.prompts)]
            scores[mode].update(batch.images, features[mode], part)
            for meters in further.values():
                meters[mode].update(batch.images, batch.prompts)
        cfg = batches["cfg"]
        for mode, meter in agreement.items():
            meter.update(batches[mode].images, cfg.images, features[mode], features["cfg"])
        latents.update(batches["guided"].latents, batches["none"].latents, cfg.latents)
        done += len(cfg.prompts)
        report("images", done, samples)
    found = {mode: meter.compute() for mode, meter in scores.items()}
    hits = [scores[mode].retrieval.hits() for mode in modes]
    return ModelResult(
        guidance_error=error,
        latent_mse_ratio=latents.compute(),
        gain_kept=gain_kept(*(found[mode].top1 for mode in modes)),
        gain_kept_interval=gain_kept_interval(*hits, prompt=model.prompt),
        gain_kept_cosine=gain_kept(*(found[mode].cosine for mode in modes)),
        scores=found,
        agreement={mode: meter.compute() for mode, meter in agreement.items()},
        more={name: {m: x.compute() for m, x in by.items()} for name, by in further.items()},
    )


def evaluate(
    models: Mapping[str, ModelSource],
    guide: Guide,
    *,
    guide_name: str,
    command: str,
    samples: int = 1000,
    seed: int = 0,
    guidance_scale: float = 4.0,
    num_inference_steps: int = 25,
    refresh: RefreshSteps = 0,
    num_frames: int | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 15,
    scorer: Scorer | None = None,
    unfinished: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Measure a guide on every model, and its cost on the first.

    Args:
        models: by name, the base first.
        guide_name: its name in the result.
        command: the command line that repeats the run.
        refresh: see :func:`evaluate_model`.
        num_frames: likewise.
        batch_sizes: of the wall clock.
        rounds: of the wall clock.
        unfinished: file of the models that are finished; the same call resumes from it. To be
            deleted when the result is saved.
        settings: further ones of :func:`evaluate_model`.

    Raises:
        ValueError: no model; and as :func:`evaluate_model`.
        GuideError: the guide does not fit a model.
    """
    if not models:
        raise ValueError("there is no model to evaluate on")
    _check(samples, guidance_scale)
    refresh = check_refresh(refresh)
    # or these would only be refused after the timing
    total_batch_size(settings.get("batch_size", 1))
    _check_further(settings.get("inception_weights"), settings.get("clip"), models)
    scorer = scorer or Scorer.bundled()
    parts = PartialResults(unfinished)
    weights = parts.checksums({"guide": guide})  # before a model changes its precision
    if weights and guide.guidance != CFG:
        weights["guidance"] = str(guide.guidance)
    results: dict[str, ModelResult] = {}
    cost, size = None, None
    same: dict[str, Any] = {
        "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps,
        "refresh": as_json(refresh),
    }  # fmt: skip
    frames = frames_setting(num_frames)
    for name, source in models.items():
        pipe = source.load()
        check(guide, pipe)
        networks = parts.checksums({**modules(pipe), "scorer": scorer.model})
        facts = same | settings | frames | {
            "samples": samples, "seed": seed, "reference_images": source.reference_images,
            "weights": weights | networks,
        }  # fmt: skip
        if cost is None or size is None:
            size = GuideSize.of(guide, pipe, guide_name)
            measure = partial(
                measure_cost, pipe, guide, batch_sizes=batch_sizes, rounds=rounds,
                num_frames=num_frames, **same,
            )  # fmt: skip
            timing = {"rounds": rounds, "batch_sizes": list(batch_sizes)}
            cost = parts.get(Cost, facts | timing, partial(on_main, measure))
            run = Run(
                command, seed, samples, machine=machine(), versions=versions(),
                dtype=dtype_name(pipe), guidance=str(guide.guidance), **same,
            )  # fmt: skip
        model = partial(
            evaluate_model, pipe, guide, reference_images=source.reference_images,
            samples=samples, seed=seed, scorer=scorer, progress=named_progress(progress, name),
            num_frames=num_frames, **same, **settings,
        )  # fmt: skip
        results[name] = parts.get(ModelResult, facts, model)
    assert cost is not None and size is not None
    return Result(results, size, cost, run)


def as_json(refresh: RefreshSteps) -> int | float | list[int]:
    """As a result holds it."""
    return refresh if isinstance(refresh, int | float) else list(refresh)


def frames_setting(num_frames: int | None) -> dict[str, int]:
    """As unfinished results hold it; those of images, and those that are there, have none."""
    return {} if num_frames is None else {"num_frames": num_frames}


def dtype_name(pipe: Any) -> str:
    """The precision of a pipeline's denoiser, such as ``float32``."""
    return str(Backbone.of_pipeline(pipe).denoiser.dtype).removeprefix("torch.")


def _check(samples: int, guidance_scale: float) -> None:
    if guidance_scale <= 1:
        raise ValueError(f"CFG gains nothing at w = {guidance_scale:g}; use a larger one")
    if samples < 2:
        raise ValueError(f"at least two samples are needed, not {samples}")


def _check_further(
    weights: str | Path | None, clip: str | Path | None, models: Mapping[str, ModelSource]
) -> None:
    """Open what further scores need once, so that a wrong path is refused before the timing."""
    if weights is not None:
        if any(source.reference_images is None for source in models.values()):
            raise ValueError(NO_REFERENCE)
        InceptionFID(weights, None)
    if clip is not None:
        Scorer.from_folder(clip)


def _further_meters(
    weights: str | Path | None, clip: str | Path | None, reference: torch.Tensor | None
) -> dict[str, dict[str, InceptionFID | ClipScore]]:
    meters: dict[str, dict[str, InceptionFID | ClipScore]] = {}
    if weights is not None:
        if reference is None:
            raise ValueError(NO_REFERENCE)
        meters["fid"] = {mode: InceptionFID(weights, reference) for mode in GuidanceMode}
    if clip is not None:
        scorer = Scorer.from_folder(clip)
        meters["clip_score"] = {mode: ClipScore(scorer) for mode in GuidanceMode}
    return meters
