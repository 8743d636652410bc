"""Several processes that measure together, as ``accelerate launch`` or ``torchrun`` start them.

Each process samples its share of every batch, so that a seed gives the same image in any number
of processes. The images are gathered, and every process scores all of them. Only the first
process times, reads and writes. A single process does all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object, parse_flag_from_env

T = TypeVar("T")
TIMEOUT = timedelta(hours=6)
"""How long processes wait for the first, which may be timing something slow."""


def is_main() -> bool:
    """Whether this is the process that writes."""
    return bool(_state().is_main_process)


def process() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    state = _state()
    return int(state.process_index), int(state.num_processes)


def device() -> torch.device:
    """The device of this process: its own accelerator where there is one."""
    place: torch.device = _state().device
    return place


def total_batch_size(size: int) -> int:
    """The batch of all processes, where each takes ``size``.

    Raises:
        ValueError: less than 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, not {size}")
    return size * process()[1]


def share(count: int) -> list[int]:
    """The indices in [0, count) of this process. All have equally many; the last index is
    repeated where they could not."""
    index, processes = process()
    each = -(-count // processes)
    return [min(index * each + i, count - 1) for i in range(each)]


def gather_shares(count: int, *shares: torch.Tensor) -> list[torch.Tensor]:
    """Tensors (count, ...) of all indices, from those (n, ...) of :func:`share` in each process,
    on the device of the shares."""
    state = _state()
    if state.num_processes == 1:
        return list(shares)
    return [gather(t.to(state.device).contiguous())[:count].to(t.device) for t in shares]


def gather_objects(mine: T) -> list[T]:
    """The objects of all processes, in every process."""
    return list(gather_object([mine]))


def on_main(call: Callable[[], T]) -> T:
    """The result of a function in the first process, in every process."""
    state = _state()
    if state.num_processes == 1:
        return call()
    found: list[Any] = [call() if state.is_main_process else None]
    broadcast_object_list(found)
    result: T = found[0]
    return result


def _state() -> Any:
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
