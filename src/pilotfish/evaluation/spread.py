"""A measurement on several processes, as ``accelerate launch`` or ``torchrun`` starts them.

Each process draws its share of every batch, by index, so that a seed gives the same picture
whoever draws it. What they draw is gathered, and all of them go on with the whole. The first
alone times, reads and writes. One process does all of it as if none of this were here.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, parse_flag_from_env

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""How long processes wait for the first, which may be timing something slow."""


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return bool(_state().is_main_process)


def device() -> torch.device:
    """Where this process draws: on its own accelerator, where there is one, as in training."""
    place: torch.device = _state().device
    return place


def whole_batch(size: int) -> int:
    """The batch of all processes together, where each takes ``size``.

    Raises:
        ValueError: less than 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, not {size}")
    return size * int(_state().num_processes)


def share(count: int) -> list[int]:
    """The places in [0, count) that are this process's. All have equally many: the last is there
    more than once where they could not."""
    state = _state()
    each = -(-count // state.num_processes)
    first = each * state.process_index
    return [min(first + i, count - 1) for i in range(each)]


def gathered(count: int, *shares: torch.Tensor) -> list[torch.Tensor]:
    """Tensors (count, ...) of all places, from one (n, ...) of those of :func:`share` in each
    process. They come back to where the shares lay."""
    state = _state()
    if state.num_processes == 1:
        return list(shares)
    return [gather(t.to(state.device).contiguous())[:count].to(t.device) for t in shares]


def process() -> tuple[int, int]:
    """(index of this process, how many there are)."""
    state = _state()
    return int(state.process_index), int(state.num_processes)


def everyone(mine: T) -> list[T]:
    """What each process gives, in all of them."""
    return list(gather_object([mine]))


def total(number: int) -> int:
    """The sum over all processes."""
    return sum(everyone(number))


def on_main(call: Callable[[], T]) -> T:
    """What a function gives in the first process, told to all others."""
    state = _state()
    if state.num_processes == 1:
        return call()
    told: list[Any] = [call() if state.is_main_process else None]
    broadcast_object_list(told)
    found: T = told[0]
    return found


def _state() -> Any:
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
