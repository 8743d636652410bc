"""Stages ``guides`` and ``step_guides``: guides of the bundled ones' form.

``guides`` distils a guide for the base; ``step_guides`` distils it further for few steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig, StepsConfig
from pilotfish.training.stages import distill, distill_steps
from recipe.finetunes import DISTANT, TRAIN_FINETUNES, finetune_folder

ALL: dict[str, Any] = {
    "train_finetunes": tuple(TRAIN_FINETUNES), "pool": 512, "finetune_prob": 0.6,
    "replay_reuse": 2,
}  # fmt: skip
FIRST = ALL | {"max_train_steps": 2000, "negative_prompt_prob": 0.25, "refresh_prob": 0.5}
"""The teacher's trajectories: single steps, from which a new guide learns fastest."""
TRACKING = ALL | {
    "training_samples": "tracking", "max_train_steps": 2500, "learning_rate": 4e-3,
    "lr_warmup_steps": 20, "ema_decay": 0.98, "negative_prompt_prob": 0.4,
    "replay_capacity": 2048, "trajectory_steps_min": 16,
}  # fmt: skip
"""The student's own trajectories, with refreshes."""
TINY = {"guide": {"condition_on_negative": True, "uncond_templates": 16, "rank": 15}}
"""Conditioning on the negative prompt has the parameters of three ranks, the templates those of
six."""

TRAININGS: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny": (FIRST | TINY, TRACKING | TINY),
    "full": (FIRST | {"guide_type": "full"},),
}
"""The trainings of each guide. Each begins with the guide of the one before."""


@dataclass(frozen=True)
class StepGuidesStage:
    """How guides for few steps are trained."""

    steps: tuple[int, ...] = (16, 8, 4)
    max_train_steps: int = 600
    learning_rate: float = 3e-3


def make_guide(name: str, work: Path, target: Path, *, bf16: bool) -> None:
    """Run all trainings of a guide; save it in half precision."""

    def train(settings: dict[str, Any], folder: Path, init_from: Path | None) -> Guide:
        return distill(
            DistillConfig(
                output=str(folder), checkpointing_steps=100, validation_steps=200,
                report_to="none", resume="latest", mixed_precision=_precision(bf16),
                init_from=str(init_from / "guide") if init_from else None, **settings,
            )
        )  # fmt: skip

    folder = None
    for i, settings in enumerate(TRAININGS[name]):
        last, folder = folder, work / f"guide-{name}-{i}"
        guide = train(settings, folder, last)
    guide.half().save_pretrained(target / "guides" / name)


def make_step_guides(work: Path, target: Path, stage: StepGuidesStage, *, bf16: bool) -> None:
    """Distil the tiny guide for fewer steps; save one guide a round as ``tiny-<steps>``."""
    folder = target / "guides"
    distant = (str(finetune_folder(target, work, name)) for name in DISTANT)
    config = StepsConfig(
        output=str(work / "step_guides"), guide=str(folder / "tiny"), teacher="cfg",
        steps=stage.steps, max_train_steps=stage.max_train_steps,
        learning_rate=stage.learning_rate, checkpointing_steps=100, validation_steps=600,
        report_to="none", resume="latest", mixed_precision=_precision(bf16), pool=512,
        train_finetunes=(*distant, "noto-v1", "fxemoji"), finetune_prob=0.75,
        negative_prompt_prob=0.25,
    )  # fmt: skip
    for steps, guide in distill_steps(config, Guide.from_pretrained(folder / "tiny")).items():
        guide.half().save_pretrained(folder / f"tiny-{steps}")


def _precision(bf16: bool) -> Literal["no", "bf16"]:
    return "bf16" if bf16 else "no"
