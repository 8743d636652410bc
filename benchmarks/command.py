"""``pilotfish benchmark``: CFG, a plain pass and a guided pass, side by side."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console

from benchmarks.largest_batch import largest_batches
from benchmarks.shapes import SHAPES, ShapesResult, measure_shape, timed_as
from benchmarks.training_memory import around_the_denoiser, training_memory
from pilotfish import bundled
from pilotfish.cli.names import guide, host, usable
from pilotfish.evaluation.cost import cost, guide_size
from pilotfish.evaluation.machine import machine
from pilotfish.evaluation.table import cost_table, shapes_table, training_table
from pilotfish.pipelines import check
from pilotfish.training.kinds import KINDS

PACKED = "TORCHINDUCTOR_FREEZING"
"""An environment variable: whether a compiler packs weights beforehand."""
BOTH: tuple[Literal["tiny", "full"], ...] = ("tiny", "full")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to time. Ratios are medians over rounds in which the three take turns."""

    guide: str = "tiny"
    """Guide: tiny, a folder or hub id, or a kind that distill knows, fresh: what a guide has
    learnt does not change what it costs."""
    pretrained_model_name_or_path: str = "base"
    """Pipeline: base, fluent, twemoji, emojione, or a folder or hub id."""
    batch_sizes: tuple[int, ...] = (1, 8)
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    rounds: int = 15
    shape: tuple[Literal["sd15", "sd21", "sdxl"], ...] = ()
    """Full-size denoisers with random weights, in place of a pipeline: one step of a plain pass,
    CFG and the guides, side by side."""
    guides: tuple[Literal["tiny", "full"], ...] = BOTH
    """Of full-size denoisers, the guides that are timed."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    """Time the denoiser compiled (torch.compile), in every way. On a CPU,
    ``TORCHINDUCTOR_FREEZING=1`` before the command packs the weights beforehand."""
    device: str = "cpu"
    """Such as cuda."""
    counted: bool = False
    """Count parameters and operations of full-size denoisers; time nothing, and need no memory."""
    memory: float | None = None
    """GiB of a device: of full-size denoisers, how many pictures at once it holds in each way,
    counted in ``--precision``."""
    train: bool = False
    """Of full-size denoisers, the memory of a training step of the tiny or full guide
    (``--guide``) on a base held in ``--precision``, with gradient checkpointing: computed part by
    part and, unless ``--counted``, measured."""
    output: str | None = None
    """JSON file of full-size denoisers; what it holds of other shapes, or of these in another
    precision or compiled, stays in it."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        BenchmarkConfig, args=list(arguments), prog="pilotfish benchmark", use_underscores=True
    )
    _fit_together(config)
    if config.shape:
        packed = [f"{PACKED}=1"] if config.compile and os.environ.get(PACKED) == "1" else []
        _shapes(config, shlex.join([*packed, "pilotfish", "benchmark", *arguments]))
        return
    pipe = host(config.pretrained_model_name_or_path)
    pipe.to(usable(config.device), getattr(torch, config.precision))
    if config.guide in KINDS and config.guide not in bundled.guide_names():
        prediction = pipe.scheduler.config.prediction_type
        network = KINDS[config.guide].for_denoiser(pipe.unet, prediction)
    else:
        network = guide(config.guide)
    check(network, pipe)
    size = guide_size(network, pipe, config.guide)
    spent = cost(
        pipe, network, batch_sizes=config.batch_sizes, rounds=config.rounds,
        guidance_scale=config.guidance_scale, num_inference_steps=config.num_inference_steps,
        compiled=config.compile,
    )  # fmt: skip
    print(f"{size.name}: {size.parameters:,} parameters, {size.share:.2%} of the denoiser")
    print(f"on {machine()}")
    Console().print(cost_table(spent))


def _fit_together(config: BenchmarkConfig) -> None:
    """Refuse a flag that would have no effect beside the others.

    Raises:
        ValueError: says which, and of what it is; or no memory at all.
    """
    full_size = "of full-size denoisers: add --shape"
    given = {
        "--output": (config.output is not None, config.shape, full_size),
        "--counted": (config.counted, config.shape, full_size),
        "--memory": (
            config.memory is not None, config.shape and not config.train,
            "of a sampling step of full-size denoisers: add --shape, without --train",
        ),
        "--train": (config.train, config.shape, full_size),
        "--guides": (config.guides != BOTH, config.shape, full_size),
        "--compile": (
            config.compile, not (config.counted or config.train),
            "of what is timed, which --counted and --train are not",
        ),
    }  # fmt: skip
    for flag, (asked, fits, what) in given.items():
        if asked and not fits:
            raise ValueError(f"{flag} is {what}")
    if config.memory is not None and not config.memory > 0:
        raise ValueError(f"--memory must be above 0 GiB, not {config.memory:g}")


def _shapes(config: BenchmarkConfig, command: str) -> None:
    output = Path(config.output) if config.output else None
    result = ShapesResult.load(output) if output and output.is_file() else ShapesResult({})
    dtype, counted = getattr(torch, config.precision), config.counted
    usable(config.device)
    for name in config.shape:
        row = name if counted or config.train else timed_as(name, config.precision, config.compile)
        before = result.shapes.get(row)
        if config.train:
            made = training_memory(
                name, SHAPES[name], config.guide, command=command, dtype=dtype,
                batch=config.batch_sizes[0], measured=not counted, device=config.device,
            )  # fmt: skip
            shape = before or measure_shape(SHAPES[name], command=command, batch_sizes=())
            shape.training[config.guide] = made
        else:
            shape = measure_shape(
                SHAPES[name], command=command, device=config.device, rounds=config.rounds,
                dtype=dtype, batch_sizes=() if counted else config.batch_sizes,
                guides=config.guides, compiled=config.compile,
            )  # fmt: skip
            if before:
                shape.training.update(before.training)
                shape.largest_batch.update(before.largest_batch)
                if counted:  # what was timed stays, with what it says of itself
                    shape = replace(before, guides=shape.guides, flops=shape.flops)
            if config.memory is not None:
                around = sum(around_the_denoiser(name, dtype).values())
                shape.largest_batch[f"{config.precision}, {config.memory:g} GiB"] = largest_batches(
                    SHAPES[name], dtype, config.memory * 2**30, around
                )
        result.shapes[row] = shape
        if output:
            result.save(output)
    Console().print(training_table(result) if config.train else shapes_table(result))
