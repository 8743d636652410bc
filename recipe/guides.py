"""Stages 6 and 7, ``guides`` and ``steps``: the guides that the project carries, distilled from
the base, and those for few steps that are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pilotfish.guides import Guide
from pilotfish.guides.mean import mean_guide
from pilotfish.training.config import DistillConfig, StepsConfig
from pilotfish.training.stages import distill, distill_steps
from recipe.finetunes import FAR, PRACTICE, far_folder


@dataclass(frozen=True)
class StepGuides:
    """How guides for few steps are made."""

    rounds: tuple[int, ...] = (16, 8, 4)
    max_train_steps: int = 600
    learning_rate: float = 3e-3


ARTISTS = ("noto-v1", "fxemoji")
"""Those of the carried practice fine-tunes on which the guides for few steps practise too."""

PRACTISED: dict[str, Any] = {"practice": tuple(PRACTICE), "pool": 512}
FRESH: dict[str, Any] = {"max_train_steps": 2000, "practice_share": 0.6, "negative_share": 0.25}
NEGATIVE = {
    "max_train_steps": 2800, "learning_rate": 5e-3, "practice_share": 0.5, "negative_share": 0.55,
    "trajectory_steps_min": 16,
}  # fmt: skip
"""What a negative prompt asks for is the harder part: it is learnt late, and for longer."""
SETTLED: dict[str, Any] = {
    "learning_rate": 3e-3, "lr_warmup_steps": 20, "ema_decay": 0.98, "negative_share": 0.6,
    "trajectory_steps_min": 25, "trajectory_steps_max": 25, "replay_reuse": 10**6, "practice": (),
}  # fmt: skip
"""Whole trajectories of the base, walked once and shuffled: each batch is of states that have
nothing to do with one another, and a short training at a falling rate settles on their mean."""
LONGER = {"max_train_steps": 700, "pool": 2048, "replay_capacity": 51200}
SHORTER = {"max_train_steps": 300, "pool": 1536, "replay_capacity": 38400, "seed": 1}
TINY = {"negative": True, "picture": 16, "rank": 19}
"""To look at the negative prompt itself takes what three channels of every layer take, and a
picture of what it leads to six more."""

GUIDES: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny": (FRESH | TINY, NEGATIVE | TINY),
    "full": (FRESH | {"guide": "full"},),
}
"""The trainings of each, every one beginning with what the one before has made."""
APART: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny": (SETTLED | TINY | LONGER, SETTLED | TINY | SHORTER),
}
"""Then those that begin with the last of these, each for itself. The guide is the mean of all,
the one that they began with as well, which knows the fine-tunes best."""


def make_guide(name: str, work: Path, target: Path, *, bf16: bool) -> None:
    """Distil one in all its trainings; save it in half precision."""

    def trained(what: dict[str, Any], number: str, begin_with: Path | None) -> Guide:
        return distill(
            DistillConfig(
                output_dir=str(work / f"guide-{name}{number}"), checkpointing_steps=100,
                validation_steps=200, report_to="none", resume="latest",
                mixed_precision=_precision(bf16),
                begin_with=str(begin_with) if begin_with else None, **PRACTISED | what,
            )
        )  # fmt: skip

    made: Path | None = None
    for i, training in enumerate(GUIDES[name]):
        number = f"-{i}" if i else ""
        guide = trained(training, number, made)
        made = work / f"guide-{name}{number}" / "guide"
    apart = [trained(what, f"-apart-{i}", made) for i, what in enumerate(APART.get(name, ()))]
    mean_guide([guide, *apart]).half().save_pretrained(target / "guides" / name)


def make_step_guides(work: Path, target: Path, stage: StepGuides, *, bf16: bool) -> None:
    """Teach the tiny guide to take fewer steps; save each round's as ``tiny-<steps>``."""
    folder = target / "guides"
    config = StepsConfig(
        output_dir=str(work / "steps"), guide=str(folder / "tiny"), teacher="cfg",
        steps=stage.rounds, max_train_steps=stage.max_train_steps,
        learning_rate=stage.learning_rate, checkpointing_steps=100, validation_steps=600,
        report_to="none", resume="latest", mixed_precision=_precision(bf16), pool=512,
        practice=(*(str(far_folder(work, style)) for style in FAR), *ARTISTS),
        practice_share=0.75, negative_share=0.25,
    )  # fmt: skip
    for steps, guide in distill_steps(config, Guide.from_pretrained(folder / "tiny")).items():
        guide.half().save_pretrained(folder / f"tiny-{steps}")


def _precision(bf16: bool) -> Literal["no", "bf16"]:
    return "bf16" if bf16 else "no"
