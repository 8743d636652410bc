"""What was measured of a guide, as its model card tells it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import replace

from huggingface_hub import EvalResult

from pilotfish.backbones import portable_path
from pilotfish.evaluation.result import Result
from pilotfish.evaluation.table import LEGEND, markdown_table

TASK = "text-to-image"


def portable(result: Result) -> Result:
    """The same without the paths of the machine that measured: their last parts are left."""
    words = map(_portable, shlex.split(result.run.command))
    return replace(
        result,
        run=replace(result.run, command=shlex.join(words)),
        guide=replace(result.guide, name=portable_path(result.guide.name)),
    )


def measured(result: Result, file: str) -> str:
    """The table in Markdown, and how to repeat it; ``file`` holds everything, beside the card."""
    run, guide = result.run, result.guide
    return (
        f"{markdown_table(result)}\n"
        f"Measured by `{run.command}` on {run.machine}, seed {run.seed}, {run.samples:,} pictures "
        f"for each host and way, {run.num_inference_steps} steps; everything is in "
        f"[{file}]({file}). The guide has {guide.share:.2%} of the denoiser's parameters. {LEGEND}"
    )


def eval_results(result: Result) -> list[EvalResult]:
    """The same for the card's header; what is not a number is left out."""
    return [
        EvalResult(
            task_type=TASK, dataset_type=host,
            dataset_name=f"{result.run.samples} pictures on {host}, "
            f"w = {result.run.guidance_scale:g}",
            metric_type=kind, metric_name=kind.replace("_", " "), metric_value=round(value, 4),
        )
        for host, kind, value in _figures(result)
        if math.isfinite(value)
    ]  # fmt: skip


def _figures(result: Result) -> Iterator[tuple[str, str, float]]:
    for name, host in result.hosts.items():
        yield name, "guidance_error", host.guidance_error.mean
        if host.cfg.prompt_score > host.none.prompt_score:  # else there is no gain to keep
            yield name, "gain_kept", host.gain_kept
        yield name, "prompt_score", host.guided.prompt_score


def _portable(word: str) -> str:
    """One word of a command line, where a path may stand after ``flag=``."""
    flag, joined, value = word.rpartition("=")
    return flag + joined + portable_path(value)
