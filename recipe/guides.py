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
FIRST = ALL | {"max_train_steps": 2000, "finetune_prob": 0.6, "negative_prompt_prob": 0.25}
NEGATIVE = ALL | {
    "max_train_steps": 2800, "learning_rate": 5e-3, "finetune_prob": 0.5,
    "negative_prompt_prob": 0.55, "trajectory_steps_min": 16,
}  # fmt: skip
"""Negative prompts are harder than the null prompt: they are trained late, and for longer."""
FINAL: dict[str, Any] = {
    "learning_rate": 3e-3, "lr_warmup_steps": 20, "ema_decay": 0.98, "negative_prompt_prob": 0.6,
    "trajectory_steps_min": 25, "trajectory_steps_max": 25, "replay_reuse": 10**6,
}  # fmt: skip
"""Whole trajectories of the base, sampled once and shuffled, so that the samples of a batch are
independent."""
TINY = {
    "guide": {
        "condition_on_negative": True, "uncond_templates": 16, "rank": 19, "refresh": False,
    },
}  # fmt: skip
"""The bundled guides are of before there were refreshes. Conditioning on the negative prompt has
the parameters of three ranks, the templates those of six."""

TRAININGS: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny": (FIRST | TINY, NEGATIVE | TINY),
    "full": (FIRST | {"guide_type": "full"},),
}
"""The trainings of each guide. Each begins with the guide of the one before."""
BRANCHES: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny": (
        FINAL | TINY | {"max_train_steps": 700, "pool": 2048, "replay_capacity": 51200},
        FINAL | TINY | {"max_train_steps": 300, "pool": 1536, "replay_capacity": 38400, "seed": 1},
    ),
}
"""Trainings that each begin with the last of :data:`TRAININGS`. The guide is the mean of that and
of all branches; its beginning knows the fine-tunes best."""


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
