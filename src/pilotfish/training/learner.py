"""A guide in training: its optimiser, its learning rate and its moving average."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from pilotfish.guides import Guide
from pilotfish.teacher import Student
from pilotfish.training.checkpoints import (
    Checkpoint,
    check_forms,
    optimizer_numbers,
    optimizer_tensors,
    restore_optimizer,
)
from pilotfish.training.config import ConfigError, TrainingConfig
from pilotfish.training.sharding import make_whole, shared_out, whole


class Learner:
    """See the module.

    Args:
        student: the base with the guide on it.
        learning_rate: the highest.

    Raises:
        ConfigError: Adam in eight bits is wanted, and bitsandbytes is not installed.

    Attributes:
        student: the same, prepared for training: what is called.
    """

    def __init__(
        self, student: Student, config: TrainingConfig, learning_rate: float,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        guide = student.guide
        self.guide, self.config, self.accelerator = guide, config, accelerator
        guide.to(accelerator.device).train()
        optimizer = _adam(config.use_8bit_adam)(
            guide.parameters(), learning_rate, (0.9, 0.99), weight_decay=config.adam_weight_decay
        )
        self.rate = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        self.average = EMAModel(guide.parameters(), decay=config.ema_decay, foreach=False)
        self.average.to(accelerator.device)

    def learn(self, loss: torch.Tensor) -> None:
        """Backward, and an update where gradients are whole (see gradient accumulation)."""
        accelerator = self.accelerator
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.guide.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            self.rate.step()
            self.average.step(self.guide.parameters())

    def averaged(self) -> Guide:
        """A copy of the guide with its averaged weights: a pipeline may turn it to its own
        precision."""
        guide = deepcopy(self.guide)
        self.average.copy_to(guide.parameters())
        make_whole(guide)
        return guide.eval()

    def finish(self) -> Guide:
        """The guide with its averaged weights, for good."""
        self.average.copy_to(self.guide.parameters())
        make_whole(self.guide)
        return self.guide.eval()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be saved of weights, average and optimiser. Every process must ask."""
        shadow = self.average.state_dict()["shadow_params"]
        tensors = {f"guide.{k}": v for k, v in self.guide.state_dict().items()}
        tensors |= {f"average.{i}": v for i, v in enumerate(shadow)}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        return {k: whole(v) for k, v in tensors.items()}

    def facts(self) -> dict[str, Any]:
        """What must be saved beside it, plain numbers."""
        average = {k: v for k, v in self.average.state_dict().items() if k != "shadow_params"}
        rate = {k: v for k, v in self.rate.state_dict().items() if _is_plain(v)}
        scaler = self.accelerator.scaler
        numbers = optimizer_numbers(self.optimizer)
        return {"average": average, "rate": rate, "optimizer": numbers} | (
            {} if scaler is None else {"scaler": scaler.state_dict()}
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Put back what :meth:`tensors` and :meth:`facts` gave.

        Raises:
            ValueError, KeyError: they are not of this guide, or some are missing.
        """
        facts, expected = checkpoint.facts, Checkpoint(0, self.tensors(), {})
        for what in ("guide", "average"):
            check_forms(checkpoint.part(what), expected.part(what), what)
        mine, parameters = self.guide.state_dict(), list(self.guide.parameters())
        self.guide.load_state_dict(
            {k: shared_out(v, mine[k]) for k, v in checkpoint.part("guide").items()}
        )
        if self.accelerator.scaler is not None and "scaler" in facts:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        shadow = checkpoint.part("average")
        ordered = [shared_out(shadow[str(i)], p) for i, p in enumerate(parameters)]
        settled = {"decay": self.config.ema_decay, "shadow_params": ordered}
        self.average.load_state_dict(facts["average"] | settled)
        self.average.to(self.accelerator.device)
        slots = {
            name: shared_out(value, parameters[int(name.partition(".")[0])])
            for name, value in checkpoint.part("optimizer").items()
        }
        restore_optimizer(self.optimizer, slots | facts.get("optimizer", {}))
        # how far it is comes from the checkpoint, how high it goes from this run's settings
        bases, shares = self.rate.base_lrs, self.rate.lr_lambdas
        step = facts["rate"]["last_epoch"]
        rates = [base * share(step) for base, share in zip(bases, shares, strict=True)]
        mine = {"base_lrs": bases, "_last_lr": rates}
        self.rate.load_state_dict(self.rate.state_dict() | facts["rate"] | mine)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _adam(in_8_bits: bool) -> Any:
    """The class of the optimiser."""
    if not in_8_bits:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "--use_8bit_adam needs bitsandbytes: pip install 'pilotfish[8bit]'"
        ) from error
    return AdamW8bit


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool, list, str))
