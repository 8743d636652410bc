"""What guidance costs: denoiser passes, FLOPs, wall clock side by side, parameters."""

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

from pilotfish.backbones import watch_hooks
from pilotfish.evaluation.result import Cost, GuideSize
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import Attachable

K = TypeVar("K")
WAYS = ("plain", "cfg", "guided")


def guide_size(guide: Guide, pipe: Any, name: str) -> GuideSize:
    """The guide's parameters, and their share of the denoiser's."""
    mine, base = (sum(p.numel() for p in m.parameters()) for m in (guide, pipe.unet))
    return GuideSize(name, mine, mine / base)


@torch.no_grad()
def cost(
    pipe: Any,
    guide: Guide,
    *,
    prompt: str = "",
    guidance_scale: float = 4.0,
    num_inference_steps: int = 25,
    batch_sizes: Sequence[int] = (1, 8),
    rounds: int = 5,
    compiled: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Measure one pipeline in the three ways.

    Times are of whole calls up to the final latents, prompt included. The ways take turns,
    round after round in one run, so that whatever else the machine does strikes all alike;
    a ratio is the median over the ratios of single rounds.

    Args:
        prompt: what is drawn; the cost does not depend on it.
        batch_sizes: pictures at once.
        rounds: timed rounds, after one that warms up.
        compiled: compile the denoiser before they are timed, with ``torch.compile``, for all three
            ways; it stays so.
        clock: seconds, rising.

    Raises:
        ValueError: w of at most 1, where CFG takes one pass too; no round, no step, no picture.
    """
    if guidance_scale <= 1:
        raise ValueError(f"CFG costs a second pass only for w above 1, not {guidance_scale}")
    if rounds < 1 or not batch_sizes:
        raise ValueError("the cost needs at least one round and one batch size")
    if min(num_inference_steps, *batch_sizes) < 1:
        raise ValueError("the cost needs at least one step, and batch sizes of at least 1")
    scales = {"plain": 1.0, "cfg": guidance_scale, "guided": guidance_scale}

    def call(way: str, batch: int, steps: int) -> float:
        return timed_call(
            pipe, guide if way == "guided" else None, scales[way], steps, batch, prompt, clock
        )

    passes = {}
    for way in WAYS:
        with counted_rows(pipe.unet) as rows:
            call(way, 2, num_inference_steps)
        passes[way] = sum(rows) / 2
    flops = {way: denoiser_flops(pipe, lambda way=way: call(way, 1, 1)) for way in WAYS}  # type: ignore[misc]
    if compiled:
        watch_hooks()
        pipe.unet.compile()
    times = {
        batch: take_turns(
            {way: partial(call, way, batch, num_inference_steps) for way in WAYS}, rounds
        )
        for batch in batch_sizes
    }
    return Cost(
        cfg_over_guided={str(b): speed_up(t, "guided") for b, t in times.items()},
        cfg_over_plain={str(b): speed_up(t, "plain") for b, t in times.items()},
        flops=flops,
        passes=passes,
        seconds={
            str(b): {way: statistics.median(r[way] for r in t) for way in WAYS}
            for b, t in times.items()
        },
    )


@contextmanager
def counted_rows(denoiser: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of every call of a denoiser inside the block; a doubled batch is two
    passes for each picture, however it is called."""
    rows: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows.append(len(args[0] if args else kwargs["sample"]))

    handle = denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def timed_call(
    pipe: Any, method: Attachable | None, guidance_scale: float, steps: int, batch: int,
    prompt: str = "", clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """Seconds of one call of the pipeline, up to the final latents."""
    if isinstance(method, Guide):
        method.to(pipe.unet.device, pipe.unet.dtype)
    pipe.set_progress_bar_config(disable=True)
    with method.attached(pipe) if method else nullcontext():
        start = clock()
        pipe(
            [prompt] * batch, guidance_scale=guidance_scale, num_inference_steps=steps,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        if pipe.unet.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def take_turns(calls: Mapping[K, Callable[[], float]], rounds: int) -> list[dict[K, float]]:
    """What each call gives, round after round, after one that warms up."""
    return [{way: call() for way, call in calls.items()} for _ in range(rounds + 1)][1:]


def speed_up(rounds: Sequence[dict[str, float]], way: str) -> float:
    """How much faster a way is than ``cfg``: the median over the ratios of single rounds."""
    return statistics.median(r["cfg"] / r[way] for r in rounds)


def denoiser_flops(pipe: Any, call: Callable[[], object]) -> int:
    """FLOPs inside the denoiser during ``call``, what a guide adds in its hooks included."""
    # Torch's counter knows no fused attention on the CPU; the plain form is counted in full.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(sum(counter.get_flop_counts()[type(pipe.unet).__name__].values()))
