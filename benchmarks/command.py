"""``pilotfish benchmark``: no guidance, CFG and a guide, side by side."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.measure import (
    ShapeResult,
    ShapesResult,
    call_speedup,
    measure_shape,
    result_key,
)
from benchmarks.memory import largest_batches, pipeline_parts, training_memory
from benchmarks.operators import OperatorCount, count_operators, count_shape
from benchmarks.presets import count_presets, presets_markdown
from benchmarks.shapes import SHAPES
from benchmarks.step import GUIDES, REFRESHED
from pilotfish import bundled
from pilotfish.backbones import Backbone
from pilotfish.cli.names import open_guide, open_model, usable_device
from pilotfish.evaluation.results import GuideSize, machine
from pilotfish.evaluation.speed import measure_cost
from pilotfish.evaluation.tables import cost_table, number
from pilotfish.guides import Guide
from pilotfish.noise import prediction_type
from pilotfish.pipelines.attach import check
from pilotfish.training import presets

FREEZING = "TORCHINDUCTOR_FREEZING"
"""An environment variable of torch: whether its compiler packs weights beforehand."""


ShapeName = Literal[
    "sd15", "sd21", "sdxl", "sd35-medium", "sd35-large", "qwen-image", "z-image", "lumina2", "sana",
    "wan-1.3b", "wan-14b",
]  # fmt: skip


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time no guidance, CFG and a guide. They take turns; ratios are medians over the rounds."""

    models: tuple[str, ...] = ("base",)
    """Pipelines: base, fluent, twemoji, emojione, high-contrast, monotone, streamline; sd3,
    sd3-fluent, sd3-twemoji, sd3-emojione; or folders or hub ids."""
    guide: str | None = None
    """A bundled guide, a folder or a hub id. Left out: that of the bundled base."""
    guide_type: tuple[str, ...] = ()
    """A fresh guide of this type, one that ``distill`` knows, in place of --guide: the cost does
    not depend on the weights. With --shape one or more of tiny, tiny-cached and tiny-sampled (tiny
    with --negative_stream cached, for joint attention, and SD3 only, with --joint_attention sampled
    as well) and full (UNets only); all that fit if left out."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Images in one call."""
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    refresh: int = 0
    """Steps of the guide that run both passes, whatever refresh_ratio the guide has. No effect with
    --shape and --operators."""
    rounds: int = 15
    shape: tuple[ShapeName, ...] = ()
    """Full-size denoisers with random weights, in place of a pipeline: one sampling step."""
    side: int | None = None
    """With --shape: pixels of the timed images, each way. Default: those of the pipeline's call.
    Counts are always of the default."""
    operators: bool = False
    """Count the operators that a guide adds to a plain pass, by name; time nothing."""
    count_only: bool = False
    """With --shape: count parameters and FLOPs; time nothing, and need no memory."""
    memory: float | None = None
    """With --shape: GiB of a device, to compute the largest batch that it holds in each mode in
    ``--dtype``."""
    train: bool = False
    """With --shape: the memory of a training step on a base in ``--dtype`` with gradient
    checkpointing, computed by purpose and, unless ``--count_only``, measured. The memory of a
    sampling step is computed as well."""
    weights: tuple[Literal["fp8", "nf4"], ...] = ()
    """With --train and --count_only: the base's weights stored in these formats as well."""
    presets: tuple[str, ...] = ()
    """Count the memory that presets of ``distill`` need, by name, or all of them: ``all``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False
    """Time the denoiser compiled (torch.compile), in all modes. On a CPU,
    ``TORCHINDUCTOR_FREEZING=1`` before the command packs the weights beforehand."""
    device: str = "cpu"
    """Device to time on, such as cuda."""
    output: str | None = None
    """With --shape and --presets: JSON file. Results of other shapes, precisions and compilations
    stay in it; those of other presets do not."""

    def __post_init__(self) -> None:
        with_shape = "needs --shape"
        rules = {
            "--refresh": (
                self.refresh, not (self.shape or self.operators),
                "has no effect with --shape and --operators",
            ),
            "--output": (
                self.output is not None, self.shape or self.presets, "needs --shape or --presets"
            ),
            "--presets": (self.presets, not (self.shape or self.operators), "goes without --shape"),
            "--count_only": (self.count_only, self.shape, with_shape),
            "--train": (self.train, self.shape, with_shape),
            "--weights": (
                self.weights, self.train and self.count_only, "needs --train and --count_only"
            ),
            "--side": (
                self.side is not None,
                self.shape and not (self.count_only or self.train or self.operators),
                "needs --shape, and has no effect with --count_only, --train and --operators",
            ),
            "--memory": (
                self.memory is not None, self.shape and not self.train,
                "needs --shape, and has no effect with --train",
            ),
            "--compile": (
                self.compile, not (self.count_only or self.train or self.operators),
                "has no effect with --count_only, --train and --operators",
            ),
            "--operators": (
                self.operators, not (self.count_only or self.train or self.memory),
                "cannot be combined with --count_only, --train and --memory",
            ),
        }  # fmt: skip
        for flag, (given, fits, problem) in rules.items():
            if given and not fits:
                raise ValueError(f"{flag} {problem}")
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"--memory must be above 0 GiB, not {self.memory:g}")
        known = GUIDES if self.shape else Guide.registry
        if unknown := [name for name in self.guide_type if name not in known]:
            raise ValueError(
                f"--guide_type {unknown[0]} is unknown here; available: {', '.join(known)}"
            )
        if len(self.guide_type) > 1 and not self.shape:
            raise ValueError("--guide_type takes one type without --shape")
        for name in self.shape:
            if unfit := [g for g in self.guide_type if g not in SHAPES[name].guides]:
                raise ValueError(f"no {unfit[0]} guide fits {name}; choose another --guide_type")


def main(arguments: Sequence[str]) -> None:
    """Run ``pilotfish benchmark``."""
    config = tyro.cli(
        BenchmarkConfig, args=list(arguments), prog="pilotfish benchmark", use_underscores=True
    )
    usable_device(config.device)
    if config.presets:
        _presets(config, shlex.join(["pilotfish", "benchmark", *arguments]))
        return
    if config.shape:
        freezing = [f"{FREEZING}=1"] if config.compile and os.environ.get(FREEZING) == "1" else []
        _shapes(config, shlex.join([*freezing, "pilotfish", "benchmark", *arguments]))
        return
    counts: dict[tuple[str, str], OperatorCount] = {}
    for model in config.models:
        pipe = open_model(model, config.dtype)
        network, name = _guide(config, model, pipe)
        check(network, pipe)
        if config.operators:
            counts[model, name] = count_operators(pipe, network, config.guidance_scale)
        else:
            _time(config, model, pipe, network, name)
    if counts:
        _show_operators(counts)


def _guide(config: BenchmarkConfig, model: str, pipe: Any) -> tuple[Guide, str]:
    """The guide and its name."""
    if not config.guide_type:
        name = config.guide or bundled.guide_of(model)
        return open_guide(name), name
    (name,) = config.guide_type
    denoiser = Backbone.of_pipeline(pipe).denoiser
    fresh = Guide.registry[name].for_denoiser(denoiser, prediction_type(pipe.scheduler))
    return fresh.eval(), f"fresh {name}"


def _time(config: BenchmarkConfig, model: str, pipe: Any, network: Guide, name: str) -> None:
    pipe.to(config.device)
    size = GuideSize.of(network, pipe, name)
    found = measure_cost(
        pipe, network, batch_sizes=config.batch_sizes, rounds=config.rounds,
        guidance_scale=config.guidance_scale, num_inference_steps=config.num_inference_steps,
        compiled=config.compile, refresh=config.refresh,
    )  # fmt: skip
    print(f"{model}, {name}: {size.parameters:,} parameters, {size.share:.2%} of the denoiser")
    print(f"on {machine()}")
    Console().print(cost_table(found))


def _presets(config: BenchmarkConfig, command: str) -> None:
    names = presets.names() if config.presets == ("all",) else config.presets
    found = count_presets(names, command)
    if config.output:
        found.save(config.output)
    print(presets_markdown(found))


def _shapes(config: BenchmarkConfig, command: str) -> None:
    output = Path(config.output) if config.output else None
    result = ShapesResult.load(output) if output and output.is_file() else ShapesResult({})
    timed = not (config.count_only or config.train or config.operators)
    for name in config.shape:
        key = result_key(name, config.dtype, config.compile) if timed else name
        result.shapes[key] = _shape(config, name, command, result.shapes.get(key))
        if output:
            result.save(output)
    if config.operators:
        _show_operators({
            (name, guide): count
            for name in config.shape for guide, count in result.shapes[name].operators.items()
        })  # fmt: skip
        return
    Console().print(training_table(result) if config.train else shapes_table(result))


def _shape(
    config: BenchmarkConfig, name: str, command: str, before: ShapeResult | None
) -> ShapeResult:
    """The result of one shape. What is not measured now is kept from ``before``."""
    shape, dtype = SHAPES[name], getattr(torch, config.dtype)
    guides = config.guide_type or shape.guides
    if config.train or config.operators:
        result = before or measure_shape(shape, command=command, batch_sizes=())
        for guide_type in guides:
            if config.operators:
                result.operators[guide_type] = count_shape(shape, GUIDES[guide_type])
                continue
            for weights in ("", *config.weights):
                key = ", ".join((guide_type, *[weights] * bool(weights)))
                result.training[key] = training_memory(
                    name, shape, guide_type, command=command, dtype=dtype,
                    batch=config.batch_sizes[0], measured=not config.count_only,
                    device=config.device, weights=weights,
                )  # fmt: skip
        return result
    result = measure_shape(
        shape, command=command, device=config.device, rounds=config.rounds, dtype=dtype,
        batch_sizes=() if config.count_only else config.batch_sizes, guides=guides,
        compiled=config.compile, side=config.side,
    )  # fmt: skip
    if before:
        for kept in ("training", "largest_batch", "operators"):
            getattr(result, kept).update(getattr(before, kept))
        if config.count_only:  # the times stay, with their command and machine
            result = replace(before, guides=result.guides, flops=result.flops)
    if config.memory is not None:
        reserved = sum(pipeline_parts(name, dtype).values())
        result.largest_batch[f"{config.dtype}, {config.memory:g} GiB"] = largest_batches(
            shape, dtype, config.memory * 2**30, reserved
        )
    return result


# -- tables -----------------------------------------------------------------------------


def shapes_table(result: ShapesResult) -> Table:
    """A line for each mode of each denoiser."""
    columns = (
        "denoiser", "", "parameters", "FLOPs", "speed-up over CFG", "peak memory", "largest batch",
    )  # fmt: skip
    table = Table(title="Full size, random weights; FLOPs relative to no guidance")
    for name in columns:
        table.add_column(name, justify="left" if name in ("denoiser", "") else "right")

    def by_batch(values: dict[str, dict[str, float]], mode: str, text: Callable[..., str]) -> str:
        return ", ".join(f"{text(v[mode])} at {batch}" for batch, v in values.items() if mode in v)

    for name, shape in result.shapes.items():
        title = f"{name}, {shape.parameters / 1e6:,.0f} M"
        title += f"\ntimed at {shape.side} pixels" if shape.side else ""
        for mode, flops in shape.flops.items():
            guide = shape.guides.get(mode)
            table.add_row(
                title if mode == "none" else "",
                {"none": "no guidance", "cfg": "CFG"}.get(mode, mode),
                f"{guide.parameters / 1e6:,.2f} M, {guide.share:.2%}" if guide else "",
                f"{flops / shape.flops['none']:.3f}×",
                by_batch(shape.speedup, mode, partial(_speedup, mode)),
                by_batch(shape.peak_bytes, mode, lambda b: f"{b / 2**30:.1f} GiB"),
                "\n".join(
                    f"{n[mode]:,} in {device}"
                    for device, n in shape.largest_batch.items()
                    if mode in n
                ),
            )
        table.add_section()
    return table


def _speedup(mode: str, step: float) -> str:
    if not mode.endswith(REFRESHED):
        return f"{step:.2f}×"
    return f"{step:.2f}× ({call_speedup(step, 3, 25):.2f}× with 3 refreshes in 25 steps)"


def training_table(result: ShapesResult) -> Table:
    """A column for each guide on each denoiser: the memory of a training step by purpose."""
    table = Table("GiB", title="Memory of a training step, random weights")
    columns = []
    for name, shape in result.shapes.items():
        for guide_type, memory in shape.training.items():
            heading = f"{name}, {guide_type}\n{memory.dtype}, batch {memory.batch}"
            table.add_column(heading, justify="right")
            sampling = {f"sampling, {m}": memory.sampling[m] for m in memory.sampling}
            columns.append(
                memory.parts | {"sum": memory.total, "measured": memory.peak_bytes} | sampling
            )
    for part in dict.fromkeys(part for column in columns for part in column):
        table.add_row(part, *(number(column.get(part, math.nan) / 2**30) for column in columns))
    return table


def _show_operators(counts: dict[tuple[str, str], OperatorCount]) -> None:
    """A table, and below it each guide's operators by name."""
    table = Table(title="Operators of a denoiser pass (views and allocations)")
    for name in ("denoiser", "guide", "plain pass", "added each step", "share", "once a call"):
        table.add_column(name, justify="left" if name in ("denoiser", "guide") else "right")
    for (model, network), n in counts.items():
        table.add_row(
            model, network, f"{n.plain:,} ({n.plain_views:,})", f"{n.added:,} ({n.added_views:,})",
            f"{n.share:.1%}", f"{n.once:,}",
        )  # fmt: skip
    Console().print(table)
    for (model, network), n in counts.items():
        added = ", ".join(f"{name} {times}" for name, times in n.by_operator.items())
        print(f"{model}, {network}, each step: {added}")
