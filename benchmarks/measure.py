"""The cost of full-size denoisers with their guides: counted, timed, and saved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.memory import TrainingMemory, peak_bytes
from benchmarks.operators import OperatorCount
from benchmarks.shapes import Shape
from benchmarks.step import SamplingStep
from pilotfish.evaluation.results import GuideSize, Saved, machine, versions
from pilotfish.evaluation.speed import speed_up, take_turns


@dataclass(frozen=True)
class ShapeResult:
    """One denoiser with its guides. A mode is ``none``, ``cfg``, the name of a guide or, for its
    step after one with both passes, ``<guide>, refreshed``.

    Attributes:
        parameters: of the denoiser.
        guides: the size of each.
        flops: of one image in the mean step of a call, by mode.
        dtype: of weights and activations.
        command: the command line that repeats it.
        machine: of the wall clock.
        speedup: wall clock of CFG over that of each other mode, by batch size: medians over
            rounds in which the modes take turns.
        seconds: median of the mean step of a call, by batch size and mode.
        peak_bytes: peak memory of one step with the weights, by batch size and mode.
        training: the memory of a training step, by guide.
        largest_batch: by device ("float16, 24 GiB") and mode.
        operators: what each guide adds to a plain pass.
        compiled: whether the denoiser was compiled, in all modes.
        side: pixels of the images that were timed, each way; 0 for the pipeline's default.
    """

    parameters: int
    guides: dict[str, GuideSize]
    flops: dict[str, int]
    dtype: str
    command: str
    machine: str
    versions: dict[str, str]
    speedup: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, TrainingMemory] = field(default_factory=dict)
    largest_batch: dict[str, dict[str, int]] = field(default_factory=dict)
    operators: dict[str, OperatorCount] = field(default_factory=dict)
    compiled: bool = False
    side: int = 0


@dataclass(frozen=True)
class ShapesResult(Saved):
    """Full-size denoisers, by :func:`result_key`."""

    shapes: dict[str, ShapeResult]


def result_key(name: str, dtype: str = "float32", compiled: bool = False) -> str:
    """The key of a shape in a result: its name, with precision and compilation where they are not
    the default ("sd15, bfloat16, compiled")."""
    return ", ".join((name, *[dtype] * (dtype != "float32"), *["compiled"] * compiled))


def call_speedup(step: float, refresh: int, steps: int) -> float:
    """How much faster than CFG a call is in which ``refresh`` of the steps run both passes and the
    others are ``step`` times as fast as those of CFG."""
    return steps / (refresh + (steps - refresh) / step)


def measure_shape(
    shape: Shape, *, command: str, device: str = "cpu", dtype: torch.dtype = torch.float32,
    batch_sizes: Sequence[int] = (1,), rounds: int = 3, guides: Collection[str] | None = None,
    compiled: bool = False, side: int | None = None, notice: Callable[[str], None] = print,
) -> ShapeResult:  # fmt: skip
    """Count one shape, and time it where there are batch sizes.

    Args:
        command: the command line, for the result.
        batch_sizes: images at once; none only counts.
        rounds: in which all modes take turns, after one to warm up.
        guides: types of the guides that are timed; all that fit are counted. Left out: all.
        compiled: time the denoiser compiled, in all modes.
        side: pixels of the images that are timed, each way; left out, the pipeline's default.

    Raises:
        ValueError: no round.
    """
    if rounds < 1:
        raise ValueError(f"at least one round is needed, not {rounds}")
    counted = SamplingStep(shape, torch.device("meta"), dtype)
    result = ShapeResult(
        sum(p.numel() for p in counted.denoiser.parameters()), counted.guide_sizes(),
        {mode: counted.flops(mode) for mode in (*counted.modes, *counted.refreshed)},
        str(dtype).removeprefix("torch."), command, machine(), versions(), compiled=compiled,
        side=side or 0,
    )  # fmt: skip
    if not batch_sizes:
        return result
    notice("creating the denoiser")
    timed = [name for name in shape.guides if guides is None or name in guides]
    step = SamplingStep(shape, torch.device(device), dtype, timed, compiled=compiled, side=side)
    modes = (*step.modes, *step.refreshed)
    for batch in batch_sizes:
        if compiled:
            notice(f"batch {batch}: compiling {', '.join(modes)}")
            for mode in modes:
                step.run(mode, batch, steps=2)
        notice(f"batch {batch}: {rounds + 1} rounds of {', '.join(modes)}")
        result.peak_bytes[str(batch)] = {
            mode: peak_bytes(partial(step.run, mode, batch), step.device) for mode in modes
        }
        times = take_turns({mode: partial(step.seconds, mode, batch) for mode in modes}, rounds)
        result.speedup[str(batch)] = {m: speed_up(times, m) for m in modes if m != "cfg"}
        result.seconds[str(batch)] = {
            mode: statistics.median(turn[mode] for turn in times) for mode in modes
        }
    return result
