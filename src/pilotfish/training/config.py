"""How a guide is trained: one dataclass a stage is command line, saved file and help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from pilotfish.training.fields import needed

SEEDS = 2**23
"""Seeds that there are: beside a stream and a tick, one must fit into 64 bits."""


class ConfigError(ValueError):
    """A setting is unknown or out of its range; the message names it."""


def differing(asked: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What is asked for that what was found has otherwise, in words; empty where nothing is. What
    is of another ``kind`` has everything otherwise, and the kind says it all."""
    differs = [name for name, value in asked.items() if value != found.get(name)]
    if "kind" in differs:
        differs = ["kind"]
    return "; ".join(f"its {n} is {found.get(n)}, {asked[n]} is asked for" for n in differs)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that every stage has. Flags are named as in diffusers' own training examples."""

    output_dir: str
    """Where the guide, its checkpoints and its validation pictures go."""
    pretrained_model_name_or_path: str | None = None
    """The base pipeline, a folder or hub id. Left out: the embedded model."""
    prompts: str | None = None
    """Text file, one prompt a line; a pipe, or - for standard input, of such lines; a Parquet, CSV
    or JSON lines file, webdataset shards (.tar), a pattern or folder of those, or a data set's id
    on the hub. All but text, CSV and JSON lines need the extra ``datasets``. Prompts stay on the
    disk. Left out: those of the bundled model."""
    caption_column: str | None = None
    """Column of a data set. Left out: text, caption, prompt or txt, the first there is."""
    prompts_split: str = "train"
    """Split of a data set."""
    skip_missing_captions: bool = False
    """Skip the rows of a data set that have no text, instead of refusing them, and count them."""
    validation_prompts: str | None = None
    """Prompts for validation, held out of training; a text file, or a data set with the same
    column and split. Left out: the embedded model's, or the first 64 of your own,
    which are trained on as well."""
    practice: tuple[str, ...] = ()
    """Fine-tunes of the base to practise on beside it, so that the guide is better on others:
    folders or hub ids of pipelines, or folders of UNets or LoRAs. Of the embedded model some are
    carried: noto-v1, fxemoji, contours, flat, lit."""
    practice_share: float = 0.5
    """Share of the training steps on fine-tunes, where there are any."""
    train_batch_size: int = 64
    max_train_steps: int = 4000
    learning_rate: float | None = None
    """Left out: what suits the guide."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup",
    ] = "cosine"  # fmt: skip
    lr_warmup_steps: int = 100
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    base_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """In what the weights of the frozen denoiser and text encoders are held; the guide is trained
    in float32 in any case. Half of it is half the memory. fp16 needs ``--mixed_precision fp16``,
    which keeps gradients from vanishing on their way through it."""
    use_8bit_adam: bool = False
    """Adam's moments in eight bits, by bitsandbytes (the extra ``8bit``): worth it for the large
    guides."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    ema_decay: float = 0.995
    """Decay of the guide's moving average; the average is what is saved."""
    guidance_scale_min: float = 1.0
    guidance_scale_max: float = 8.0
    """w is drawn anew for every sample, uniformly between the two."""
    negative_share: float = 0.0
    """Share of the states with another prompt as negative prompt, in place of the null prompt."""
    student_share: float = 0.5
    """Share of the latents that the student steps itself, where the states are partly its own."""
    streams: int | None = None
    """Streams of training states, shared out among the processes. Left out: one a process, or
    those of the checkpoint. With a fixed number, which the number of processes divides, a run
    gives the same guide on one process or several."""
    pool: int = 1024
    """Latents on their way at once, in every stream: on the base, and as many on all practice
    hosts together, but two batches on each at least. With few of them the guide learns their
    prompts by heart; with many on a host whose turn comes seldom, they hardly leave the noise."""
    replay_capacity: int = 8192
    """States kept with what the teacher said of them, in every stream for all hosts together."""
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
        for name, hint in get_type_hints(type(self)).items():
            if what := needed(hint, getattr(self, name)):
                self._need(False, name, what)
        for name in (
            "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "pool",
            "replay_capacity", "replay_reuse", "checkpointing_steps", "validation_steps",
        ):  # fmt: skip
            self._need(getattr(self, name) >= 1, name, "at least 1")
        self._need(self.learning_rate is None or self.learning_rate > 0, "learning_rate", "above 0")
        for name in ("lr_warmup_steps", "adam_weight_decay"):
            self._need(getattr(self, name) >= 0, name, "at least 0")
        self._need(self.max_grad_norm > 0, "max_grad_norm", "above 0")
        limit = self.checkpoints_total_limit
        self._need(limit is None or limit >= 1, "checkpoints_total_limit", "at least 1")
        self._need(0 <= self.seed < SEEDS, "seed", f"at least 0 and below {SEEDS}")
        self._need(
            self.guidance_scale_min >= 1, "guidance_scale_min", "at least 1 (1 is no guidance)"
        )
        self._need(
            self.guidance_scale_max >= max(self.guidance_scale_min, 1 + 1e-6),
            "guidance_scale_max", "above 1 and at least guidance_scale_min",
        )  # fmt: skip
        self._need(self.streams is None or self.streams >= 1, "streams", "at least 1")
        self._need(0 <= self.practice_share <= 1, "practice_share", "between 0 and 1")
        for name in ("student_share", "negative_share"):
            self._need(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        self._need(
            self.base_dtype != "fp16" or self.mixed_precision == "fp16", "base_dtype",
            "bf16 or fp32 without --mixed_precision fp16",
        )  # fmt: skip
        self._need(0 <= self.ema_decay < 1, "ema_decay", "at least 0 and below 1")
        self._need(self.pool >= self.train_batch_size, "pool", "at least train_batch_size")

    def _need(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise ConfigError(f"{name} must be {what}, not {getattr(self, name)!r}")

    def save(self, path: Path) -> None:
        """Write as JSON; :meth:`load` and ``--config`` read it."""
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(json.dumps(asdict(self), indent=2) + "\n")
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a JSON file.

        Raises:
            ConfigError: unreadable, an unknown field, a value out of range.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            unknown = set(values) - {f.name for f in fields(cls)}
            if unknown:
                raise ConfigError(f"unknown settings: {', '.join(sorted(unknown))}")
            lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
            return cls(**values | lists)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"no configuration could be read from {path}: {error}") from error


@dataclass(frozen=True)
class DistillConfig(TrainingConfig):
    """Settings of stage 1. Flags are named as in diffusers' own training examples."""

    guide: Literal[
        "tiny", "external", "full", "agd", "agd-attention", "dice", "cfg-lora",
        "guided-distillation",
    ] = "tiny"  # fmt: skip
    """tiny: pushes the text and the answers to it, adds low-rank layers along the decoder; some
    0.1 % of SD 1.5, 1 % of the embedded denoiser. external: the paper's small network beside it.
    full: a copy of its encoder. The others are other methods, to compare with; dice and cfg-lora
    learn one scale, so give the two ends of the range the same value."""
    begin_with: str | None = None
    """A guide to train further: a folder, hub id or the name of a carried one. Its kind and its
    settings are its own; what is given beside it, other than the defaults, has to agree. Left out:
    a fresh one."""
    reads: tuple[Literal["latents", "skips"], ...] = ("latents",)
    """What an external guide sees beside t, w and text; ``latents`` is the paper's plain form."""
    push: bool = True
    """Whether a tiny guide pushes the text."""
    attention: bool = True
    """Whether a tiny guide pushes the answers of the cross-attention layers."""
    embedding: bool = True
    """Whether a tiny guide pushes what residual layers take from an embedded text."""
    negative: bool = False
    """Whether a tiny guide looks at the negative prompt itself, and not only at what the prompt
    has that it has not. Worth its few parameters where ``--negative_share`` is large."""
    rank: int = 28
    """Channels of what a tiny guide adds to each decoder layer; 0 leaves them alone."""
    head: int = 48
    """Channels of a tiny guide's part at the prediction; 0 leaves it alone."""
    picture: int = 0
    """Pictures from which a tiny guide mixes one of what the negative prompt by itself leads to;
    needs ``--negative``. On the embedded model 16 of them take the parameters of 6 of rank."""
    states: Literal["noised", "trajectory", "student"] = "trajectory"
    """Training states: noised pictures, the teacher's CFG trajectories, or those stepped
    partly by the student itself."""
    pictures: str | None = None
    """Folder with metadata.jsonl, for ``--states noised``. Left out: the embedded pictures."""
    trajectory_steps_min: int = 8
    trajectory_steps_max: int = 32
    """Sampling steps of a training trajectory, drawn for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_scale = self.guidance_scale_min == self.guidance_scale_max
        self._need(
            one_scale or self.guide not in ("dice", "cfg-lora"), "guide",
            "another where guidance_scale_min and guidance_scale_max differ",
        )  # fmt: skip
        self._need(self.rank >= 0, "rank", "at least 0")
        self._need(self.head >= 0, "head", "at least 0")
        self._need(self.picture >= 0, "picture", "at least 0")
        self._need(
            # a guide to begin with has its own
            self.picture == 0 or (self.negative and self.head > 0) or bool(self.begin_with),
            "picture", "0 unless with --negative and a head",
        )  # fmt: skip
        self._need(
            1 <= self.trajectory_steps_min <= self.trajectory_steps_max,
            "trajectory_steps_min", "between 1 and trajectory_steps_max",
        )  # fmt: skip


@dataclass(frozen=True)
class StepsConfig(TrainingConfig):
    """Settings of stage 2. Flags are named as in diffusers' own training examples."""

    guide: str = "tiny"
    """The guide to begin with, from stage 1: tiny, or a folder or hub id."""
    teacher: Literal["guide", "cfg"] = "guide"
    """Whose two steps are followed. guide: those of the guide that the round begins with, one
    pass each, as in the paper. cfg: CFG's own, two passes each, so that what the guide has wrong
    is mended and not handed on."""
    overdrive: float = 1.0
    """How much further than w CFG goes where it is the teacher, ``1 + overdrive (w - 1)``. What a
    guide cannot foresee it answers too weakly, on a fine-tune above all; more than 1 works
    against that. As with a larger w, prompt score and fd_judge must both be measured."""
    steps: tuple[int, ...] = (16, 8, 4)
    """Sampling steps after each round; each is half of the one before. The first round's
    teacher takes twice as many."""
    max_train_steps: int = 1000
    """Training steps of each round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        halves = all(a == 2 * b for a, b in pairwise(self.steps))
        self._need(
            bool(self.steps) and min(self.steps) >= 1 and halves,
            "steps", "a list of numbers, each half of the one before",
        )  # fmt: skip
        self._need(self.overdrive > 0, "overdrive", "above 0")
        by_guide = self.teacher == "guide"
        self._need(not by_guide or self.overdrive == 1, "overdrive", "1 unless the teacher is cfg")
