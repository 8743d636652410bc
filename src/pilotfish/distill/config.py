"""How a guide is distilled: one dataclass is the command line, the saved file and its help."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

LEARNING_RATES = {"tiny": 1e-2, "external": 3e-3, "full": 5e-4}


class ConfigError(ValueError):
    """A setting is unknown or out of its range; the message names it."""


@dataclass(frozen=True)
class DistillConfig:
    """Settings of stage 1. Flags are named as in diffusers' own training examples."""

    output_dir: str
    """Where the guide, its checkpoints and its validation pictures go."""
    pretrained_model_name_or_path: str | None = None
    """The base pipeline, a folder or hub id. Left out: the embedded model."""
    guide: Literal["tiny", "external", "full"] = "tiny"
    """tiny: low-rank additions along the decoder, at most 1 % of the denoiser. external: the
    paper's small network beside it. full: a copy of its encoder."""
    reads: tuple[Literal["latents", "skips"], ...] = ("latents",)
    """What an external guide sees beside t, w and text; ``latents`` is the paper's plain form."""
    push: bool = True
    """Whether a tiny guide pushes the text."""
    rank: int = 20
    """Channels of what a tiny guide adds to each decoder layer; 0 leaves them alone."""
    head: int = 48
    """Channels of a tiny guide's part at the prediction; 0 leaves it alone."""
    states: Literal["noised", "trajectory", "student"] = "trajectory"
    """Training states: noised pictures, the teacher's CFG trajectories, or those stepped
    partly by the student itself."""
    prompts: str | None = None
    """Text file, one prompt a line. Left out: the embedded model's training prompts."""
    pictures: str | None = None
    """Folder with metadata.jsonl, for ``--states noised``. Left out: the embedded pictures."""
    validation_prompts: str | None = None
    """Prompts for validation, held out of training. Left out: the embedded model's."""
    train_batch_size: int = 64
    max_train_steps: int = 4000
    learning_rate: float | None = None
    """Left out: 1e-2 for tiny, 3e-3 for external, 5e-4 for full."""
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 100
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    ema_decay: float = 0.995
    """Decay of the guide's moving average; the average is what is saved."""
    guidance_scale_min: float = 1.0
    guidance_scale_max: float = 8.0
    """w is drawn anew for every sample, uniformly between the two."""
    trajectory_steps_min: int = 8
    trajectory_steps_max: int = 32
    """Sampling steps of a training trajectory, drawn for each."""
    student_share: float = 0.5
    """Share of the latents that the student steps itself, for ``--states student``."""
    pool: int = 1024
    """Latents on their way at once; with few of them the guide learns their prompts by heart."""
    replay_capacity: int = 8192
    """States kept with the teacher's two predictions."""
    replay_reuse: int = 1
    """Training steps for each new batch of states. 1 runs the teacher at every step; more is
    faster, but the guide then learns the trajectories that it is shown by heart."""
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 2
    resume: str | None = None
    """``latest`` or a checkpoint's folder: go on from there, to the same weights."""
    validation_steps: int = 500
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "tensorboard"
    seed: int = 0

    def __post_init__(self) -> None:
        def need(holds: bool, name: str, what: str) -> None:
            if not holds:
                raise ConfigError(f"{name} must be {what}, not {getattr(self, name)!r}")

        for name in (
            "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "pool",
            "replay_capacity", "replay_reuse", "checkpointing_steps", "validation_steps",
        ):  # fmt: skip
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.rank >= 0, "rank", "at least 0")
        need(self.head >= 0, "head", "at least 0")
        need(self.rate > 0, "learning_rate", "above 0")
        need(self.guidance_scale_min >= 1, "guidance_scale_min", "at least 1 (1 is no guidance)")
        need(
            self.guidance_scale_max > self.guidance_scale_min,
            "guidance_scale_max", "above guidance_scale_min",
        )  # fmt: skip
        need(0 <= self.student_share <= 1, "student_share", "between 0 and 1")
        need(0 <= self.ema_decay < 1, "ema_decay", "at least 0 and below 1")
        need(
            1 <= self.trajectory_steps_min <= self.trajectory_steps_max,
            "trajectory_steps_min", "between 1 and trajectory_steps_max",
        )  # fmt: skip
        need(self.pool >= self.train_batch_size, "pool", "at least train_batch_size")

    @property
    def rate(self) -> float:
        """The learning rate, the guide's own where none was given."""
        return LEARNING_RATES[self.guide] if self.learning_rate is None else self.learning_rate

    def save(self, path: Path) -> None:
        """Write as JSON; :meth:`load` and ``--config`` read it."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> DistillConfig:
        """Read a JSON file.

        Raises:
            ConfigError: unreadable, an unknown field, a value out of range.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            unknown = set(values) - {f.name for f in fields(cls)}
            if unknown:
                raise ConfigError(f"{path} has unknown settings: {', '.join(sorted(unknown))}")
            if "reads" in values:
                values["reads"] = tuple(values["reads"])
            return cls(**values)
        except (OSError, json.JSONDecodeError, TypeError, AttributeError) as error:
            raise ConfigError(f"no configuration could be read from {path}: {error}") from error
