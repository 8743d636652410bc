"""Weights that FSDP has shared out: each process holds a part of every tensor of the guide.

The frozen base is not among them (see :class:`~pilotfish.teacher.Student`). What is saved
and what is validated is whole, so that a run goes on with or without FSDP.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pilotfish.training.config import ConfigError

PLAIN = (DistributedType.NO, DistributedType.FSDP)


def check(accelerator: Accelerator) -> None:
    """Refuse what would share out a guide in a way that it cannot be put together from.

    Raises:
        ConfigError: DeepSpeed, Megatron, or the first version of FSDP.
    """
    kind = accelerator.distributed_type
    if kind not in PLAIN and not kind.value.startswith("MULTI_"):
        raise ConfigError(
            f"{kind.value} is not supported; a guide is small: use plain processes, or FSDP with "
            "fsdp_version: 2"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("of FSDP only version 2 is supported; set fsdp_version: 2")


def is_shared_out(module: nn.Module) -> bool:
    """Whether each process holds a part."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; where it is shared out, every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor shared out as another of its shape is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def make_whole(module: nn.Module) -> None:
    """Put a module's parameters together in every process; it is trained no further."""
    for name, parameter in list(module.named_parameters()):
        if isinstance(parameter, DTensor):
            owner, _, leaf = name.rpartition(".")
            together = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
            setattr(module.get_submodule(owner), leaf, together)
