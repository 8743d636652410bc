"""Stages ``guides``, ``step_guides`` and ``sizes``: the bundled guides, and some of other sizes.

``guides`` distils a guide for a base; ``step_guides`` distils it further for few steps; ``sizes``
distils guides of several shares of the base's parameters, alike and for a shorter time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.guides import Guide
from pilotfish.guides.average import average_guides
from pilotfish.training.config import DistillConfig, StepsConfig
from pilotfish.training.stages import distill, distill_steps
from recipe.finetunes import TRAIN_FINETUNES, BaseName, finetune_folder

ALL: dict[str, Any] = {"pool": 512, "finetune_prob": 0.6, "replay_reuse": 2}
FIRST = ALL | {
    "max_train_steps": 2000, "negative_prompt_prob": 0.25, "refresh_prob": 0.65,
    "first_step_refresh_prob": 0.5,
}  # fmt: skip
"""The teacher's trajectories: single steps, from which a new guide learns fastest. With a negative
prompt the error is largest in the first steps, so at least half of the first refreshes are the
first step."""
TRACKING = ALL | {
    "training_samples": "tracking", "max_train_steps": 1200, "learning_rate": 4e-3,
    "lr_warmup_steps": 20, "ema_decay": 0.98, "negative_prompt_prob": 0.5,
    "first_step_refresh_prob": 0.5, "replay_capacity": 2048, "trajectory_steps_min": 16,
}  # fmt: skip
"""The student's own trajectories."""
_NEGATIVE = {"condition_on_negative": True, "uncond_templates": 16}
TINY: dict[BaseName, dict[str, Any]] = {
    "base": {"guide": _NEGATIVE | {"rank": 15, "head": 45, "normalize_text": False}},
    "sd3": {"guide": _NEGATIVE | {"negative_stream": "cached"}},
}  # fmt: skip
"""Of a guide for each base. Conditioning on the negative prompt has the parameters of three ranks,
the templates those of six."""


TRAININGS: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny": (FIRST, TRACKING),
    "full": (FIRST | {"guide_type": "full", "refresh_prob": 0.0},),
}
"""The trainings of each guide. Each begins with the mean of those before; the result is the mean of
all."""
REFRESH_RATIO = {"tiny": 0.12}
"""Of each guide. Chosen before the frontier was measured."""
SIZES: dict[str, dict[str, Any]] = {
    "share-0.1": {"share": 0.001, "condition_dim": 8},
    "share-0.3": {"share": 0.003, "condition_dim": 16},
    "share-1": {"share": 0.01},
    "share-3": {"share": 0.03, "condition_dim": 64},
}
"""Settings of guides by their share of the base's parameters, in per cent."""
SIZE_STEPS = 500


STEP_TRAIN_STEPS: dict[BaseName, int] = {"base": 200, "sd3": 400}
"""Training steps of a round of guides for few steps."""


@dataclass(frozen=True)
class StepGuidesStage:
    """How guides for few steps are trained."""

    steps: tuple[int, ...] = (16, 8, 4)
    max_train_steps: int | None = None
    """Of a round. Default: 200 for base, 400 for sd3."""
    learning_rate: float = 1.5e-3


def distil(
    settings: dict[str, Any], folder: Path, *, bf16: bool, init_from: Path | None = None
) -> Guide:
    """One training."""
    return distill(
        DistillConfig(
            output=str(folder), checkpointing_steps=100, validation_steps=200, report_to="none",
            resume_from_checkpoint="latest", mixed_precision="bf16" if bf16 else "no",
            init_from=str(init_from) if init_from else None, **settings,
        )
    )  # fmt: skip


def trained_on(target: Path, base: BaseName) -> dict[str, Any]:
    """The settings that name a base and the fine-tunes that are trained on beside it."""
    if base == "base":
        return {"train_finetunes": tuple(TRAIN_FINETUNES)}
    folders = (str(finetune_folder(target, name, base)) for name in TRAIN_FINETUNES)
    return {
        "pretrained_model_name_or_path": str(target / base), "train_finetunes": tuple(folders),
        "prompts": str(target / "prompts" / "training.txt"),
        "validation_prompts": str(target / "prompts" / "held_out.txt"),
    }  # fmt: skip


def guide_name(name: str, base: BaseName) -> str:
    """Of a bundled guide, such as ``tiny`` and ``sd3-tiny``."""
    return name if base == "base" else f"{base}-{name}"


def make_guide(name: str, work: Path, target: Path, *, bf16: bool, base: BaseName = "base") -> None:
    """Run all trainings of a guide; save the mean in half precision."""
    guides: list[Guide] = []
    form = TINY[base] if name == "tiny" else {}
    saved = guide_name(name, base)
    for i, settings in enumerate(TRAININGS[name]):
        folder, begin = work / f"guide-{saved}-{i}", None
        if guides:
            begin = folder.with_name(f"{folder.name}-begin")
            average_guides(guides).save_pretrained(begin)
        settings = settings | trained_on(target, base) | form
        guides.append(distil(settings, folder, bf16=bf16, init_from=begin))
    guide = average_guides(guides)
    if name in REFRESH_RATIO:
        guide.register_to_config(refresh_ratio=REFRESH_RATIO[name])
    guide.half().save_pretrained(target / "guides" / saved)


def make_sizes(work: Path, target: Path, *, bf16: bool) -> None:
    """Train the guides of :data:`SIZES`, each in ``work / <name>``."""
    for name, guide in SIZES.items():
        settings = FIRST | trained_on(target, "base")
        settings |= {"max_train_steps": SIZE_STEPS, "lr_warmup_steps": 50, "guide": guide}
        distil(settings, work / name, bf16=bf16)


def make_step_guides(
    work: Path, target: Path, stage: StepGuidesStage, *, bf16: bool, base: BaseName = "base"
) -> None:
    """Distil the tiny guide for fewer steps; save one guide a round as ``tiny-<steps>``."""
    first = target / "guides" / guide_name("tiny", base)
    config = StepsConfig(
        output=str(work / guide_name("step_guides", base)), guide=str(first), teacher="cfg",
        steps=stage.steps, max_train_steps=stage.max_train_steps or STEP_TRAIN_STEPS[base],
        learning_rate=stage.learning_rate, checkpointing_steps=100, validation_steps=200,
        report_to="none", resume_from_checkpoint="latest",
        mixed_precision="bf16" if bf16 else "no", pool=512, finetune_prob=0.75,
        replay_reuse=2, negative_prompt_prob=0.25,
        first_step_refresh_prob=0.5, lr_warmup_steps=20, ema_decay=0.98, replay_capacity=2048,
        **trained_on(target, base),
    )  # fmt: skip
    for steps, guide in distill_steps(config, Guide.from_pretrained(first)).items():
        guide.half().save_pretrained(first.with_name(f"{first.name}-{steps}"))
