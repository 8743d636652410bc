"""A guide in training: its optimiser, its learning rate and its moving average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from pilotfish.distill.checkpoints import (
    Checkpoint,
    check_forms,
    optimizer_tensors,
    restore_optimizer,
)
from pilotfish.distill.config import TrainingConfig
from pilotfish.guides import Guide
from pilotfish.passes import GuidedStudent


class Learner:
    """See the module.

    Args:
        student: the base with the guide on it.
        learning_rate: the highest.

    Attributes:
        student: the same, prepared for training: what is called.
    """

    def __init__(
        self, student: GuidedStudent, config: TrainingConfig, learning_rate: float,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        guide = student.guide
        self.guide, self.config, self.accelerator = guide, config, accelerator
        guide.to(accelerator.device).train()
        optimizer = torch.optim.AdamW(
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

    @contextmanager
    def averaged(self) -> Iterator[Guide]:
        """The guide with its averaged weights, for the length of a block."""
        self.average.store(self.guide.parameters())
        self.average.copy_to(self.guide.parameters())
        self.guide.eval()
        try:
            yield self.guide
        finally:
            self.average.restore(self.guide.parameters())
            self.guide.train()

    def finish(self) -> Guide:
        """The guide with its averaged weights, for good."""
        self.average.copy_to(self.guide.parameters())
        return self.guide.eval()

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be saved of weights, average and optimiser."""
        shadow = self.average.state_dict()["shadow_params"]
        tensors = {f"guide.{k}": v for k, v in self.guide.state_dict().items()}
        tensors |= {f"average.{i}": v for i, v in enumerate(shadow)}
        return tensors | {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}

    def facts(self) -> dict[str, Any]:
        """What must be saved beside it, plain numbers."""
        average = {k: v for k, v in self.average.state_dict().items() if k != "shadow_params"}
        rate = {k: v for k, v in self.rate.state_dict().items() if _is_plain(v)}
        scaler = self.accelerator.scaler
        return {"average": average, "rate": rate} | (
            {} if scaler is None else {"scaler": scaler.state_dict()}
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Put back what :meth:`tensors` and :meth:`facts` gave.

        Raises:
            ValueError, KeyError: they are not of this guide, or some are missing.
        """
        facts, mine = checkpoint.facts, Checkpoint(0, self.tensors(), {})
        for what in ("guide", "average"):
            check_forms(checkpoint.part(what), mine.part(what), what)
        self.guide.load_state_dict(checkpoint.part("guide"))
        if self.accelerator.scaler is not None and "scaler" in facts:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        shadow = checkpoint.part("average")
        ordered = [shadow[str(i)] for i in range(len(shadow))]
        self.average.load_state_dict(facts["average"] | {"shadow_params": ordered})
        self.average.to(self.accelerator.device)
        restore_optimizer(self.optimizer, checkpoint.part("optimizer"))
        self.rate.load_state_dict(self.rate.state_dict() | facts["rate"])
        for group, rate in zip(self.optimizer.param_groups, self.rate.get_last_lr(), strict=True):
            group["lr"] = rate


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool, list, str))
