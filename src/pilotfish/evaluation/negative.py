"""Whether a negative prompt still does what it does under CFG.

Held-out prompts are paired with negative prompts, and a guide is measured against CFG with the
same pair: once told the negative prompt, and once as a guide that ignores it, told the null
prompt alone. Beside both stands the guidance error with the null prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pilotfish.evaluation.cost import guide_size
from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.machine import machine, versions
from pilotfish.evaluation.metrics import AgreementMeter, LatentMeter
from pilotfish.evaluation.parts import Unfinished, fingerprint, modules
from pilotfish.evaluation.result import Agreement, GuideSize, Run
from pilotfish.evaluation.saved import Saved
from pilotfish.evaluation.scores import Progress, prefixed
from pilotfish.evaluation.spread import everyone, process, whole_batch
from pilotfish.evaluation.ways import draw
from pilotfish.guidance_error import GuidanceError, Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.teacher import checksum

TOLD = ("told", "ignoring")


@dataclass(frozen=True)
class NegativeHost:
    """One host, against its own CFG.

    Attributes:
        null: guidance error with the null prompt.
        told: guidance error with the negative prompts.
        ignoring: the same of the guide when it is told the null prompt instead.
        ratio: the mean error ``told`` over ``null``.
        ratio_ignoring: the mean error ``ignoring`` over ``null``.
        latent_mse_ratio: MSE(told, cfg) / MSE(ignoring, cfg) of final latents, CFG with the
            negative prompts.
        agreement: with that CFG's picture, of ``told`` and of ``ignoring``.
    """

    null: GuidanceError
    told: GuidanceError
    ignoring: GuidanceError
    ratio: float
    ratio_ignoring: float
    latent_mse_ratio: float
    agreement: dict[str, Agreement]


@dataclass
class NegativeParts(Unfinished):
    """The hosts that are measured so far."""

    hosts: dict[str, NegativeHost] = field(default_factory=dict)


@dataclass(frozen=True)
class NegativeResult(Saved):
    """Everything that was measured of one guide with negative prompts."""

    hosts: dict[str, NegativeHost]
    guide: GuideSize
    run: Run


def pairs(prompts: Sequence[str]) -> list[str]:
    """A negative prompt for each prompt: the one that stands half the list further on.

    Raises:
        ValueError: fewer than two prompts, or one that would be its own negative prompt.
    """
    half = len(prompts) // 2
    found = [*prompts[half:], *prompts[:half]]
    if len(prompts) < 2 or any(p == n for p, n in zip(prompts, found, strict=True)):
        raise ValueError("negative prompts are drawn from the prompts: two that differ are needed")
    return found


def negative_host(
    pipe: Any, guide: Guide, prompts: Sequence[str], negative_prompts: Sequence[str], judge: Judge,
    *, seed: int = 0, guidance_scale: float = 4.0, num_inference_steps: int = 25,
    batch_size: int = 32, progress: Progress | None = None,
) -> NegativeHost:  # fmt: skip
    """Measure one pipeline.

    Args:
        prompts: held out of training, each drawn once, with a seed of its own.
        negative_prompts: one for each.
        seed: of the first picture; the others follow.
        batch_size: of each process.
        progress: called after every part.

    Raises:
        ValueError: as :func:`guidance_error`.
        GuideError: the guide does not fit the pipeline.
    """
    report = progress or (lambda what, done, total: None)

    walk = partial(
        Trajectories.of_pipeline, pipe, prompts, seed=seed, batch_size=batch_size,
        num_inference_steps=num_inference_steps, process=process(),
    )  # fmt: skip
    error = partial(pipeline_guidance_error, pipe, guide, gather=everyone)
    null, walks = error(walk()), walk(negative_prompts=negative_prompts, cache=True)
    told, ignoring = error(walks), error(walks, with_negative=False)
    report("guidance error", 1, 1)
    latents, agreement = LatentMeter(), {way: AgreementMeter() for way in TOLD}
    batch_size = whole_batch(batch_size)
    for i in range(0, len(prompts), batch_size):
        part = slice(i, i + batch_size)
        texts, negative = list(prompts[part]), list(negative_prompts[part])
        seeds = range(seed + i, seed + i + len(texts))
        cfg, *guided = (
            draw(
                pipe, texts, seeds, guidance_scale=guidance_scale, guide=with_guide,
                num_inference_steps=num_inference_steps, negative_prompts=against,
            )
            for with_guide, against in ((None, negative), (guide, negative), (guide, None))
        )  # fmt: skip
        made, goal = dict(zip(TOLD, guided, strict=True)), judge.images(cfg.images)
        for way, meter in agreement.items():
            meter.update(made[way].images, cfg.images, judge.images(made[way].images), goal)
        latents.update(made["told"].latents, made["ignoring"].latents, cfg.latents)
        report("pictures", i + len(texts), len(prompts))
    return NegativeHost(
        null, told, ignoring, told.mean / null.mean, ignoring.mean / null.mean,
        latents.compute(), {way: meter.compute() for way, meter in agreement.items()},
    )  # fmt: skip


def measure_negatives(
    hosts: Mapping[str, Host], guide: Guide, prompts: Sequence[str], *, guide_name: str,
    command: str, judge: Judge | None = None, seed: int = 0, guidance_scale: float = 4.0,
    num_inference_steps: int = 25, batch_size: int = 32, unfinished: str | Path | None = None,
    progress: Progress | None = None,
) -> NegativeResult:  # fmt: skip
    """Measure a guide on every host, each prompt with the negative prompt of :func:`pairs`.

    Args:
        unfinished: file that keeps each host as soon as it is measured; the same call goes on
            from it. To be deleted when the result is safe.

    Raises:
        ValueError: no host, prompts that make no pairs, a w of at most 1.
    """
    if not hosts:
        raise ValueError("there is no host to evaluate on")
    if guidance_scale <= 1:
        raise ValueError(f"a negative prompt does nothing at w = {guidance_scale:g}; take more")
    judge, negative_prompts = judge or Judge.embedded(), pairs(prompts)
    parts, results, size = NegativeParts.found(unfinished), {}, None
    # before any host has turned it to its own precision
    weights = None if unfinished is None else checksum(guide)
    same: dict[str, Any] = {
        "seed": seed, "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps
    }  # fmt: skip
    for name, host in hosts.items():
        pipe = host.load()
        size = size or guide_size(guide, pipe, guide_name)
        key = name if unfinished is None else fingerprint(
            {**modules(pipe), "judge": judge.model},
            {**same, "prompts": prompts, "guide": weights, "on": (machine(), versions())},
        )  # fmt: skip
        measure = partial(
            negative_host, pipe, guide, prompts, negative_prompts, judge, batch_size=batch_size,
            progress=prefixed(progress, name), **same,
        )  # fmt: skip
        results[name] = parts.measured(parts.hosts, key, measure, unfinished)
    assert size is not None
    run = Run(
        command, seed, len(prompts), guidance_scale, num_inference_steps, machine(), versions()
    )
    return NegativeResult(results, size, run)
