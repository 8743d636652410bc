"""What a process and a pipeline hold: memory, tensors, hooks, the bytes of every weight."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from torch import nn

from pilotfish.evaluation.results import modules
from pilotfish.teacher import checksum

MIB = 2**20


def resident(process: int | None = None) -> float:
    """Memory of a process, this one by default, that lies in RAM, in MiB."""
    return psutil.Process(process).memory_info().rss / MIB


def tensors_alive() -> int:
    """Tensors that anything still holds."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def hooks(networks: Iterable[nn.Module]) -> int:
    """Hooks of every kind on every module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    inner = (module for network in networks for module in network.modules())
    return sum(len(getattr(module, kind)) for module in inner for kind in kinds)


def weights(pipe: Any, *more: nn.Module) -> str:
    """The bytes of every weight of a pipeline, and of networks beside it, as one text."""
    return " ".join(checksum(network) for network in (*modules(pipe).values(), *more))
