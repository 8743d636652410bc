"""The state of a training: guide, optimizer, learning rate, moving average; and FSDP's shards.

Under FSDP each process holds a shard of every tensor of the guide. The frozen base is not sharded
(see :class:`~pilotfish.teacher.Student`). Saved and validated tensors are full, so a run can be
resumed with or without FSDP.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pilotfish.guides import Guide
from pilotfish.teacher import Student
from pilotfish.training.checkpoint import Checkpoint, optimizer_state, restore_optimizer
from pilotfish.training.config import ConfigError, TrainingConfig
from pilotfish.training.context import TIMEOUT
from pilotfish.training.samples import Tensors


class TrainState:
    """See the module.

    Args:
        student: the base with the guide.
        learning_rate: its peak.

    Raises:
        ConfigError: Adam in eight bits needs bitsandbytes.

    Attributes:
        student: as prepared by accelerate.
    """

    def __init__(
        self, student: Student, config: TrainingConfig, learning_rate: float,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        guide: Any = student.guide
        self.guide: Guide = guide
        self.config, self.accelerator = config, accelerator
        guide.to(accelerator.device).train()
        optimizer = _adam(config.use_8bit_adam)(
            guide.parameters(), learning_rate, (0.9, 0.99), weight_decay=config.adam_weight_decay
        )
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        self.ema = EMAModel(guide.parameters(), decay=config.ema_decay, foreach=False)
        self.ema.to(accelerator.device)

    def averaged_guide(self) -> Guide:
        """A copy of the guide with its averaged weights."""
        return self._averaged(deepcopy(self.guide))

    def finish(self) -> Guide:
        """The guide with its averaged weights, after training."""
        return self._averaged(self.guide)

    def _averaged(self, guide: Guide) -> Guide:
        self.ema.copy_to(guide.parameters())
        unshard(guide)
        return guide.eval()

    def tensors(self) -> Tensors:
        """The tensors to save. A collective operation under FSDP."""
        tensors = {f"guide.{k}": v for k, v in self.guide.state_dict().items()}
        tensors |= {f"ema.{i}": v for i, v in enumerate(self.ema.state_dict()["shadow_params"])}
        slots = optimizer_state(self.optimizer).items()
        tensors |= {f"optimizer.{k}": v for k, v in slots if isinstance(v, torch.Tensor)}
        return {k: full(v) for k, v in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """The plain numbers to save."""
        ema = {k: v for k, v in self.ema.state_dict().items() if k != "shadow_params"}
        plain = (int, float, bool, list, str)
        rate = {k: v for k, v in self.lr_scheduler.state_dict().items() if isinstance(v, plain)}
        slots = optimizer_state(self.optimizer).items()
        scaler = self.accelerator.scaler
        return {
            "ema": ema,
            "lr_scheduler": rate,
            # bitsandbytes counts steps as numbers
            "optimizer": {k: v for k, v in slots if not isinstance(v, torch.Tensor)},
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the results of :meth:`tensors` and :meth:`facts`."""
        facts, own = checkpoint.facts, self.guide.state_dict()
        parameters = list(self.guide.parameters())
        guide = {k: shard_like(v, own[k]) for k, v in checkpoint.part("guide").items()}
        self.guide.load_state_dict(guide)
        if self.accelerator.scaler is not None and facts["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        shadow = checkpoint.part("ema")
        shards = [shard_like(shadow[str(i)], p) for i, p in enumerate(parameters)]
        settings = {"decay": self.config.ema_decay, "shadow_params": shards}
        self.ema.load_state_dict(facts["ema"] | settings)
        self.ema.to(self.accelerator.device)
        slots = {
            name: shard_like(value, parameters[int(name.partition(".")[0])])
            for name, value in checkpoint.part("optimizer").items()
        }
        restore_optimizer(self.optimizer, slots | facts["optimizer"])
        # the position in the schedule is the checkpoint's, the peak is the configuration's
        peaks, factors = self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas
        step = facts["lr_scheduler"]["last_epoch"]
        rates = [peak * factor(step) for peak, factor in zip(peaks, factors, strict=True)]
        current = {"base_lrs": peaks, "_last_lr": rates}
        self.lr_scheduler.load_state_dict(
            self.lr_scheduler.state_dict() | facts["lr_scheduler"] | current
        )
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _adam(in_8_bits: bool) -> Any:
    """The optimizer's class."""
    if not in_8_bits:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "--use_8bit_adam needs bitsandbytes: pip install 'pilotfish[8bit]'"
        ) from error
    return AdamW8bit


def make_accelerator(config: TrainingConfig, log: Callable[[str], None]) -> Accelerator:
    """The accelerator of a run; ``log`` is called where its precision is slow.

    Raises:
        ConfigError: see :func:`check_distributed`.
    """
    folder = Path(config.output)
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(folder), str(folder / "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    check_distributed(accelerator)
    if warning := slow_precision(config.mixed_precision, accelerator.device):
        log(warning)
    return accelerator


def emulates_half_precision() -> bool:
    """Whether torch emulates half precision on this processor (x86 without AVX-512), where it is
    many times slower than float32."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def slow_precision(precision: str, device: torch.device) -> str | None:
    """A warning where ``no``, ``fp16`` or ``bf16`` is slow on a device."""
    if precision == "no" or device.type != "cpu" or not emulates_half_precision():
        return None
    return (
        f"this processor emulates {precision}, which is many times slower than float32; "
        "use --mixed_precision no"
    )


def check_distributed(accelerator: Accelerator) -> None:
    """Refuse kinds of distributed training whose guide cannot be saved in full.

    Raises:
        ConfigError: DeepSpeed, Megatron, or the first version of FSDP.
    """
    kind = accelerator.distributed_type
    supported = kind in (DistributedType.NO, DistributedType.FSDP)
    if not supported and not kind.value.startswith("MULTI_"):
        raise ConfigError(
            f"{kind.value} is not supported; a guide is small: use plain processes, or FSDP with "
            "fsdp_version: 2"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("FSDP is supported in version 2 only; set fsdp_version: 2")


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a shard of the parameters."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor. A collective operation where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A full tensor sharded like another of its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def unshard(module: nn.Module) -> None:
    """Replace sharded parameters by full ones, after training."""
    for name, parameter in list(module.named_parameters()):
        if isinstance(parameter, DTensor):
            owner, _, leaf = name.rpartition(".")
            replaced = nn.Parameter(full(parameter.detach()), parameter.requires_grad)
            setattr(module.get_submodule(owner), leaf, replaced)
