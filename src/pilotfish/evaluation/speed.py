"""The cost of guidance: denoiser passes, FLOPs, wall clock side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pilotfish.backbones import Backbone, watch_hooks
from pilotfish.evaluation.results import Cost
from pilotfish.guidance import GuidanceMode
from pilotfish.guides import Guide
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.sampling import Attachable
from pilotfish.refresh import RefreshSteps

K = TypeVar("K")


@torch.no_grad()
def measure_cost(
    pipe: Any,
    guide: Guide,
    *,
    prompt: str = "",
    guidance_scale: float = 4.0,
    num_inference_steps: int = 25,
    refresh: RefreshSteps = 0,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 5,
    num_frames: int | None = None,
    compiled: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """The cost of one pipeline in the three guidance modes; CFG is what the guide was taught.

    Times are of whole calls up to the final latents, prompt included. The modes take turns,
    round after round in one run, so that other load on the machine affects all alike; a ratio
    is the median over the ratios of single rounds.

    Args:
        prompt: of the images; the cost does not depend on it.
        refresh: steps of the guided mode that run both passes: how many, what ratio, or which.
        batch_sizes: images in one call.
        rounds: timed rounds, after a first one that is not timed.
        num_frames: of a video; left out, the pipeline's own number.
        compiled: compile the denoiser with ``torch.compile`` before the timing, in all modes; it
            stays compiled.
        clock: seconds, rising.

    Raises:
        ValueError: w of at most 1, where CFG takes one pass too; no round, no step, no image;
            ``num_frames`` that the pipeline does not take.
    """
    if guidance_scale <= 1:
        raise ValueError(f"CFG costs a second pass only for w above 1, not {guidance_scale}")
    if rounds < 1 or not batch_sizes:
        raise ValueError("the cost needs at least one round and one batch size")
    if min(num_inference_steps, *batch_sizes) < 1:
        raise ValueError("the cost needs at least one step, and batch sizes of at least 1")
    scales = dict.fromkeys(GuidanceMode, guidance_scale) | {GuidanceMode.NONE: 1.0}
    modes = [mode.value for mode in GuidanceMode]
    methods: dict[str, Attachable] = {
        GuidanceMode.CFG: Reference(guide.guidance), GuidanceMode.GUIDED: Refreshed(guide, refresh)
    }  # fmt: skip

    def call(mode: str, batch: int, steps: int) -> float:
        w = scales[GuidanceMode(mode)]
        return timed_call(pipe, methods.get(mode), w, steps, batch, prompt, clock, num_frames)

    denoiser = Backbone.of_pipeline(pipe).denoiser
    passes = {}
    for mode in modes:
        with counted_rows(denoiser) as rows:
            call(mode, 2, num_inference_steps)
        passes[mode] = sum(rows) / 2
    flops = {mode: denoiser_flops(pipe, partial(call, mode, 1, 1)) for mode in modes}
    if refresh:  # a single step would be the refresh
        whole = partial(call, GuidanceMode.GUIDED, 1, num_inference_steps)
        flops[GuidanceMode.GUIDED] = denoiser_flops(pipe, whole) // num_inference_steps
    if compiled:
        watch_hooks()
        denoiser.compile(dynamic=False)  # CFG's larger batch would make that of the others dynamic
    times = {}
    for batch in batch_sizes:
        if compiled:
            torch.compiler.reset()  # the number of graphs is limited
        calls = {mode: partial(call, mode, batch, num_inference_steps) for mode in modes}
        times[batch] = take_turns(calls, rounds)
    return Cost(
        cfg_over_guided={str(b): speed_up(t, "guided") for b, t in times.items()},
        cfg_over_none={str(b): speed_up(t, "none") for b, t in times.items()},
        flops=flops,
        passes=passes,
        seconds={
            str(b): {mode: statistics.median(r[mode] for r in t) for mode in modes}
            for b, t in times.items()
        },
    )


@contextmanager
def counted_rows(denoiser: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of every call of a denoiser inside the block. Each row is one pass of one
    image, so CFG counts as two in a doubled batch as well as in two calls."""
    rows: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        latents = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        rows.append(len(latents))

    handle = denoiser.register_forward_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def timed_call(
    pipe: Any, method: Attachable | None, guidance_scale: float, steps: int, batch: int,
    prompt: str = "", clock: Callable[[], float] = time.perf_counter,
    num_frames: int | None = None,
) -> float:  # fmt: skip
    """Seconds of one call of the pipeline, up to the final latents."""
    pipe.set_progress_bar_config(disable=True)
    backbone = Backbone.of_pipeline(pipe)
    call = backbone.call_arguments(pipe, guidance_scale, batch, num_frames=num_frames)
    with method.attached(pipe) if method else nullcontext():
        start = clock()
        pipe(
            prompt=[prompt] * batch, **call, num_inference_steps=steps, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - start


def take_turns(calls: Mapping[K, Callable[[], float]], rounds: int) -> list[dict[K, float]]:
    """The value of each call, round after round, without that of a first round."""
    return [{name: call() for name, call in calls.items()} for _ in range(rounds + 1)][1:]


def speed_up(rounds: Sequence[Mapping[str, float]], name: str) -> float:
    """How much faster than ``cfg`` a mode is: the median over the ratios of single rounds."""
    return statistics.median(r["cfg"] / r[name] for r in rounds)


def denoiser_flops(pipe: Any, call: Callable[[], object]) -> int:
    """FLOPs inside the denoiser during ``call``, those of a guide in its hooks included."""
    # torch's counter knows no fused attention on the CPU; the plain form is counted in full
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    name = type(Backbone.of_pipeline(pipe).denoiser).__name__
    return int(sum(counter.get_flop_counts()[name].values()))
