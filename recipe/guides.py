"""Stages ``guides`` and ``step_guides``: guides of the bundled ones' form.

``guides`` distils a guide for the base; ``step_guides`` distils it further for few steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pilotfish.guides import Guide
from pilotfish.guides.average import average_guides
from pilotfish.training.config import DistillConfig, StepsConfig
from pilotfish.training.stages import distill, distill_steps
from recipe.finetunes import DISTANT, TRAIN_FINETUNES, finetune_folder

ALL: dict[str, Any] = {"train_finetunes": tuple(TRAIN_FINETUNES), "pool": 512}
TINY: dict[str, Any] = {
    "guide": {"condition_on_negative": True, "uncond_templates": 16, "rank": 15},
    "training_samples": "on_policy", "replay_reuse": 2, "max_train_steps": 3600,
    "finetune_prob": 0.6, "negative_prompt_prob": 0.4,
}  # fmt: skip
"""Half of the trajectories are the student's own: after a refresh the guide reads how the latents
have moved since, and in use it has moved them itself."""
FULL: dict[str, Any] = {
    "guide_type": "full", "max_train_steps": 2000, "finetune_prob": 0.6,
    "negative_prompt_prob": 0.25,
}  # fmt: skip

TRAININGS: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny": (ALL | TINY,),
    "full": (ALL | FULL,),
}
"""The trainings of each guide. Each begins with the guide of the one before."""
BRANCHES: dict[str, tuple[dict[str, Any], ...]] = {}
"""Trainings that each begin with the last of :data:`TRAININGS`. The guide is the mean of that and
of all branches."""


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

    last, guides = None, []
    for i, settings in enumerate(TRAININGS[name]):
        folder = work / f"guide-{name}-{i}"
        guides, last = [train(settings, folder, last)], folder
    for i, settings in enumerate(BRANCHES.get(name, ())):
        guides.append(train(settings, work / f"guide-{name}-branch-{i}", last))
    average_guides(guides).half().save_pretrained(target / "guides" / name)


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
