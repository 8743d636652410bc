"""Denoisers at full size: what guidance costs there, with random weights.

What a pass costs does not depend on what a network has learnt. The shapes are those of the
published models' configurations; parameters and operations are counted on the meta device, so
that even the largest needs no memory, and only the wall clock needs the real thing.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pilotfish.backbones import heed_hooks
from pilotfish.evaluation.cost import denoiser_flops, guide_size, speed_up, take_turns
from pilotfish.evaluation.machine import machine, versions
from pilotfish.evaluation.result import GuideSize, TrainingMemory
from pilotfish.evaluation.saved import Saved
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.interface import TextConditions
from pilotfish.teacher import Conditioned, Student

GUIDES: dict[str, type[Guide]] = {"tiny": TinyGuide, "full": FullGuide}
TOKENS = 77
POOLED = 1280


@dataclass(frozen=True)
class Shape:
    """A published denoiser: its configuration, and what it predicts."""

    config: Mapping[str, Any]
    prediction_type: str = "epsilon"


_SD: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}  # fmt: skip
SHAPES = {
    "sd15": Shape(_SD | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd21": Shape(
        _SD | {
            "sample_size": 96, "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
        },
        "v_prediction",
    ),
    "sdxl": Shape({
        "sample_size": 128, "in_channels": 4, "out_channels": 4,
        "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + POOLED,
    }),
}  # fmt: skip
"""Stable Diffusion 1.5, 2.1 at 768 pixels and XL."""


@dataclass(frozen=True)
class ShapeResult:
    """One denoiser with its guides.

    Attributes:
        parameters: of the denoiser.
        guides: the size of each.
        flops: of one step for one picture: ``plain``, ``cfg`` and each guide.
        cfg_over: wall clock of CFG over that of ``plain`` and each guide, by batch size: medians
            over rounds in which they take turns.
        seconds: medians of one step, by batch size.
        peak_bytes: memory in use at most during one step, weights included, by batch size.
        precision: of weights and passes.
        compiled: whether the denoiser was compiled, for every way of using it.
        command: the command line that repeats it.
        machine: on which the wall clock ran.
        training: by guide, what a training step takes of memory.
        largest_batch: pictures at once by way, by precision and memory of a device, "float16,
            24 GiB".
    """

    parameters: int
    guides: dict[str, GuideSize]
    flops: dict[str, int]
    precision: str
    command: str
    machine: str
    versions: dict[str, str]
    cfg_over: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_bytes: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, TrainingMemory] = field(default_factory=dict)
    largest_batch: dict[str, dict[str, int]] = field(default_factory=dict)
    compiled: bool = False


@dataclass(frozen=True)
class ShapesResult(Saved):
    """Full-size denoisers, by :func:`timed_as`."""

    shapes: dict[str, ShapeResult]


def timed_as(name: str, precision: str = "float32", compiled: bool = False) -> str:
    """What a shape is called in a result: its name alone as it comes, in float32, or "sd15,
    bfloat16, compiled"."""
    precisely = () if precision == "float32" else (precision,)
    return ", ".join((name, *precisely, *(("compiled",) if compiled else ())))


class Steps:
    """One sampling step of a denoiser in each way, ready to be called.

    Args:
        shape: which.
        device: ``meta`` counts without computing.
        dtype: of weights and passes.
        guides: by name.
        guide_dtype: of their weights, if another.
        compiled: with ``torch.compile``; each way is compiled at its first step.
    """

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype,
        guides: Mapping[str, type[Guide]] = GUIDES, guide_dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        with device, made_in(dtype):
            self.unet = UNet2DConditionModel(**shape.config)
        with device, made_in(guide_dtype or dtype):
            self.guides = {
                name: kind.for_denoiser(self.unet, shape.prediction_type)
                for name, kind in guides.items()
            }
        for module in (self.unet, *self.guides.values()):
            module.eval().requires_grad_(False)
        pixels = 8 * self.unet.config.sample_size
        if compiled:
            heed_hooks()
            self.unet.compile()
        self.sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=device)
        self.base = Conditioned(self.unet, self.sizes)

    @property
    def ways(self) -> tuple[str, ...]:
        """A plain pass, CFG, and each guide."""
        return "plain", "cfg", *self.guides

    def sizes_of_guides(self) -> dict[str, GuideSize]:
        """Parameters, and their share of the denoiser's."""
        return {name: guide_size(guide, self, name) for name, guide in self.guides.items()}

    @contextmanager
    def ready(self, way: str, batch: int) -> Iterator[Callable[[], object]]:
        """What makes one step of ``batch`` pictures, with all in place that a pipeline has in
        place before its first; CFG makes its two passes in one call."""
        rows = 2 * batch if way == "cfg" else batch
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        z = torch.zeros(rows, channels, side, side, device=self.device, dtype=self.dtype)
        t, prompts = torch.full((rows,), 500, device=self.device), self.prompts(rows)
        if way not in self.guides:
            yield partial(self.base, z, t, prompts)
            return
        student = Student(self.guides[way], self.unet, self.sizes)
        scale = torch.full((rows,), 4.0, device=self.device)
        try:
            yield partial(student, z, t, prompts, self.prompts(1), scale)
        finally:
            student.hooks.remove()

    @torch.no_grad()
    def step(self, way: str, batch: int) -> None:
        """One step of ``batch`` pictures."""
        with self.ready(way, batch) as call:
            call()

    def prompts(self, rows: int) -> TextConditions:
        """Encoded texts that say nothing."""
        pooled, width = None, self.unet.config.cross_attention_dim
        if self.unet.config.addition_embed_type is not None:
            pooled = torch.zeros(rows, POOLED, device=self.device, dtype=self.dtype)
        hidden = torch.zeros(rows, TOKENS, width, device=self.device, dtype=self.dtype)
        return TextConditions(hidden, pooled)

    def flops(self, way: str) -> int:
        """Operations of one step of one picture."""
        return denoiser_flops(self, partial(self.step, way, 1))

    def seconds(self, way: str, batch: int) -> float:
        """Wall clock of one step."""
        with torch.no_grad(), self.ready(way, batch) as call:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Networks that are made inside the block have this precision from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def measure_shape(
    shape: Shape, *, command: str, device: str = "cpu", dtype: torch.dtype = torch.float32,
    batch_sizes: Sequence[int] = (1,), rounds: int = 3, guides: Collection[str] = tuple(GUIDES),
    compiled: bool = False, notice: Callable[[str], None] = print,
) -> ShapeResult:  # fmt: skip
    """Count one shape, and time it where there are batch sizes.

    Args:
        command: what the result says of how to repeat it.
        batch_sizes: pictures at once; none at all only counts.
        rounds: in which all ways take turns, after one that warms up.
        guides: which of ``GUIDES`` are timed; all are counted.
        compiled: time the denoiser compiled, in every way.

    Raises:
        ValueError: no round.
    """
    if rounds < 1:
        raise ValueError(f"at least one round is needed, not {rounds}")
    counted = Steps(shape, torch.device("meta"), dtype)
    result = ShapeResult(
        sum(p.numel() for p in counted.unet.parameters()), counted.sizes_of_guides(),
        {way: counted.flops(way) for way in counted.ways}, str(dtype).removeprefix("torch."),
        command, machine(), versions(), compiled=compiled,
    )  # fmt: skip
    if not batch_sizes:
        return result
    notice("making the denoiser")
    kinds = {name: GUIDES[name] for name in guides}
    real = Steps(shape, torch.device(device), dtype, kinds, compiled=compiled)
    for batch in batch_sizes:
        if compiled:
            notice(f"batch {batch}: compiling {', '.join(real.ways)}")
            for way in real.ways:
                real.step(way, batch)
        notice(f"batch {batch}: {rounds + 1} rounds of {', '.join(real.ways)}")
        result.peak_bytes[str(batch)] = {
            way: peak_bytes(partial(real.step, way, batch), real.device) for way in real.ways
        }
        turns = take_turns({way: partial(real.seconds, way, batch) for way in real.ways}, rounds)
        others = [way for way in real.ways if way != "cfg"]
        result.cfg_over[str(batch)] = {way: speed_up(turns, way) for way in others}
        result.seconds[str(batch)] = {
            way: statistics.median(turn[way] for turn in turns) for way in real.ways
        }
    return result


def peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """Memory in use at most during a call: on CUDA what tensors take, on Linux what the whole
    process does; not a number elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device))
    reset = Path("/proc/self/clear_refs")
    if sys.platform != "linux" or not reset.exists():
        call()
        return float("nan")
    try:
        reset.write_text("5")  # begin a new peak; see proc(5)
    except OSError:
        call()
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
