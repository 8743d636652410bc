"""How many pictures at once a device holds, in each way of guiding, at full size.

A step is taken on tensors that have shapes and no contents, so any machine can answer for any
device: see :class:`~benchmarks.live_bytes.LiveBytes`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import LiveBytes, module_bytes
from benchmarks.shapes import Shape, Steps


def largest_batches(
    shape: Shape, dtype: torch.dtype, memory: float, around: float = 0.0
) -> dict[str, int]:
    """The largest batch of a plain pass, of CFG in one call, and of each guide.

    Args:
        shape: of the denoiser.
        dtype: of weights and passes.
        memory: bytes of the device.
        around: bytes of what else lies on it, such as text encoders and VAE.

    Returns:
        Pictures at once, by way; 0 where not even one fits.
    """
    with FakeTensorMode(), LiveBytes() as live:
        steps = Steps(shape, torch.device("cpu"), dtype)
        left = memory - around
        return {way: largest(partial(_bytes, steps, live, way), left) for way in steps.ways}


def step_bytes(shape: Shape, dtype: torch.dtype, way: str, batch: int) -> float:
    """What denoiser, guide and one step of a batch take at most."""
    with FakeTensorMode(), LiveBytes() as live:
        return _bytes(Steps(shape, torch.device("cpu"), dtype), live, way, batch)


def _bytes(steps: Steps, live: LiveBytes, way: str, batch: int) -> float:
    live.most = before = live.now
    steps.step(way, batch)
    guide = module_bytes(steps.guides[way]) if way in steps.guides else 0.0
    return module_bytes(steps.unet) + guide + live.most - before


def largest(taken: Callable[[int], float], memory: float) -> int:
    """The largest n for which ``taken(n)`` is at most ``memory``; 0 if 1 is too large.

    ``taken`` grows with n in nearly equal steps, so that two of its values tell where to look.
    """
    one, two = taken(1), taken(2)
    n = max(0, int(1 + (memory - one) / max(two - one, 1.0)))
    while taken(n + 1) <= memory:
        n += 1
    while n and taken(n) > memory:
        n -= 1
    return n
