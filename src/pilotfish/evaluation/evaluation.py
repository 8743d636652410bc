"""The whole measurement: a guide on a base and, untouched, on its fine-tunes.

Each host is measured against its own CFG, from the same noise in all three ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pilotfish.evaluation.cost import cost, guide_size
from pilotfish.evaluation.external import ClipScore, InceptionFID
from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.machine import machine, versions
from pilotfish.evaluation.metrics import (
    AgreementMeter,
    LatentMeter,
    gain_kept,
    gain_kept_interval,
    indices,
)
from pilotfish.evaluation.parts import Parts, fingerprint, modules
from pilotfish.evaluation.result import HostResult, Interval, Result, Run
from pilotfish.evaluation.scores import Progress, ScoreMeter, prefixed, real_pictures
from pilotfish.evaluation.spread import everyone, on_main, process, whole_batch
from pilotfish.evaluation.ways import WAYS, Drawn, three_ways, walk
from pilotfish.guidance_error import SCALES, Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.teacher import checksum


def evaluate_host(
    pipe: Any,
    guide: Guide,
    *,
    prompts: Sequence[str],
    names: Sequence[str],
    pictures_folder: str | Path | None,
    held_out: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
    guidance_scale: float = 4.0,
    num_inference_steps: int = 25,
    batch_size: int = 32,
    judge: Judge | None = None,
    guidance_scales: Sequence[float] = SCALES,
    inception_weights: str | Path | None = None,
    clip: str | Path | None = None,
    known: list[dict[str, Drawn]] | None = None,
    progress: Progress | None = None,
) -> HostResult:
    """Measure one pipeline.

    Args:
        prompts: what is drawn; all of them are among the names.
        names: among which the judge must find the right one.
        pictures_folder: real pictures in the host's style, the reference of ``fd_judge``.
        held_out: prompts of the guidance error, unknown to the guide.
        samples: pictures in each way; the prompts go round, each time with new seeds.
        seed: of the first picture; the others follow.
        batch_size: of each process.
        judge: the embedded one if left out.
        guidance_scales: each w of the guidance error.
        inception_weights: if given, Inception FID as well.
        clip: folder of a CLIP; if given, CLIP score as well.
        known: pictures without guidance and with CFG, of an earlier guide in all the same
            settings; an empty list is filled with them.
        progress: called after every batch.

    Raises:
        ValueError: a prompt that is no name, fewer than two samples, a wrong path.
        GuideError: the guide does not fit the pipeline.
    """
    _check(samples, guidance_scale)
    judge = judge or Judge.embedded()
    texts, seeds = walk(prompts, samples, seed)
    right, named = indices(texts, names), judge.texts(list(names))
    real = real_pictures(pipe, pictures_folder)
    scores = {way: ScoreMeter(judge, named, real) for way in WAYS}
    further = _further(inception_weights, clip, real)
    agreement = {way: AgreementMeter() for way in ("guided", "none")}
    latents = LatentMeter()
    report = progress or (lambda what, done, total: None)
    report("guidance error", 0, 1)
    trajectories = Trajectories.of_pipeline(
        pipe, held_out, guidance_scales=guidance_scales, seed=seed, process=process(),
        num_inference_steps=num_inference_steps, batch_size=batch_size,
    )  # fmt: skip
    error = pipeline_guidance_error(pipe, guide, trajectories, gather=everyone)
    report("guidance error", 1, 1)
    done = 0
    for batch in three_ways(
        pipe, guide, texts, seeds, guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps, batch_size=batch_size, known=known,
    ):  # fmt: skip
        features = {way: judge.images(drawn.images) for way, drawn in batch.items()}
        for way, drawn in batch.items():
            part = right[done : done + len(drawn.prompts)].to(features[way].device)
            scores[way].update(drawn.images, features[way], part)
            for meters in further.values():
                meters[way].update(drawn.images, drawn.prompts)
        for way, meter in agreement.items():
            meter.update(batch[way].images, batch["cfg"].images, features[way], features["cfg"])
        latents.update(*(batch[way].latents for way in ("guided", "none", "cfg")))
        done += len(batch["cfg"].prompts)
        report("pictures", done, samples)
    none, cfg, guided = (scores[way].compute() for way in WAYS)
    return HostResult(
        guidance_error=error,
        latent_mse_ratio=latents.compute(),
        gain_kept=gain_kept(none.prompt_score, cfg.prompt_score, guided.prompt_score),
        gain_kept_interval=Interval(
            *gain_kept_interval(
                scores["none"].prompt.found(),
                scores["cfg"].prompt.found(),
                scores["guided"].prompt.found(),
            )
        ),
        gain_kept_cosine=gain_kept(none.cosine, cfg.cosine, guided.cosine),
        none=none,
        cfg=cfg,
        guided=guided,
        agreement={way: meter.compute() for way, meter in agreement.items()},
        more={name: {w: m.compute() for w, m in by.items()} for name, by in further.items()},
    )


def evaluate(
    hosts: Mapping[str, Host],
    guide: Guide,
    *,
    guide_name: str,
    command: str,
    samples: int = 1000,
    seed: int = 0,
    guidance_scale: float = 4.0,
    num_inference_steps: int = 25,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 15,
    judge: Judge | None = None,
    unfinished: str | Path | None = None,
    known: dict[str, list[dict[str, Drawn]]] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Measure a guide on every host, and its cost on the first.

    Args:
        hosts: by name, the base first.
        guide_name: what the result calls the guide.
        command: the command line that repeats the run.
        batch_sizes: at which the wall clock is compared.
        rounds: of the wall clock.
        unfinished: file that keeps each host as soon as it is measured; the same call goes on
            from it. To be deleted when the result is safe.
        known: by host, see :func:`evaluate_host`; an empty dict is filled.
        settings: the rest of :func:`evaluate_host`.

    Raises:
        ValueError: no host; and what :func:`evaluate_host` raises.
    """
    if not hosts:
        raise ValueError("there is no host to evaluate on")
    _check(samples, guidance_scale)
    whole_batch(settings.get("batch_size", 1))  # or it would only be refused after the timing
    judge = judge or Judge.embedded()
    file = Path(unfinished) if unfinished is not None else None
    parts = Parts.found(file)
    # before any host has turned it to its own precision
    weights = None if file is None else checksum(guide)
    results: dict[str, HostResult] = {}
    spent, size = None, None
    same: dict[str, Any] = {
        "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps
    }  # fmt: skip
    for name, host in hosts.items():
        pipe = host.load()
        key = name if file is None else fingerprint(
            {**modules(pipe), "judge": judge.model},
            {**same, **settings, "samples": samples, "seed": seed, "pictures": host.pictures,
             "guide": weights, "on": (machine(), versions())},
        )  # fmt: skip
        if spent is None or size is None:
            size = guide_size(guide, pipe, guide_name)
            timed = f"{key} {rounds} {list(batch_sizes)}"
            clock = partial(cost, pipe, guide, batch_sizes=batch_sizes, rounds=rounds, **same)
            spent = parts.measured(parts.costs, timed, partial(on_main, clock), file)
        measure = partial(
            evaluate_host, pipe, guide, pictures_folder=host.pictures, samples=samples, seed=seed,
            judge=judge, progress=prefixed(progress, name),
            known=None if known is None else known.setdefault(name, []), **same, **settings,
        )  # fmt: skip
        results[name] = parts.measured(parts.hosts, key, measure, file)
    assert spent is not None and size is not None
    run = Run(command, seed, samples, machine=machine(), versions=versions(), **same)
    return Result(results, size, spent, run)


def _check(samples: int, guidance_scale: float) -> None:
    if guidance_scale <= 1:
        raise ValueError(f"there is nothing to keep of CFG at w = {guidance_scale:g}; take more")
    if samples < 2:
        raise ValueError(f"at least two samples are needed, not {samples}")


def _further(
    weights: str | Path | None, clip: str | Path | None, real: torch.Tensor | None
) -> dict[str, dict[str, InceptionFID | ClipScore]]:
    meters: dict[str, dict[str, InceptionFID | ClipScore]] = {}
    if weights is not None:
        if real is None:
            raise ValueError("Inception FID needs a folder of real pictures")
        meters["fid"] = {way: InceptionFID(weights, real) for way in WAYS}
    if clip is not None:
        meters["clip_score"] = {way: ClipScore(clip) for way in WAYS}
    return meters
