"""Settings of a training. One dataclass per stage defines file, flags and help texts."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from pilotfish.data.text_files import write_text
from pilotfish.guidances import CFG, Guidance
from pilotfish.guides import Guide
from pilotfish.training.fields import (
    RULES,
    Probability,
    Quantization,
    Resolution,
    Text,
    first_error,
)
from pilotfish.training.fields import ConfigError as ConfigError
from pilotfish.training.fields import config_dataclass as config_dataclass

SEEDS = 2**23
"""Number of seeds: (seed, stream, tick) must fit into 64 bits."""


@config_dataclass
class TrainingConfig:
    """Settings of both stages. Flags are named as in diffusers' training examples."""

    output: Text
    """Folder for the guide, its checkpoints and validation images."""
    pretrained_model_name_or_path: Text | None = None
    """The base pipeline: base or sd3, which are bundled, or a folder or hub id. Default: base."""
    variant: Text | None = None
    """Variant of the base's weight files, such as fp16."""
    prompts: Text | None = None
    """Text file, one prompt a line; a pipe, or - for standard input, of such lines; a Parquet, CSV
    or JSON lines file, webdataset shards (.tar), a pattern or folder of those, or a data set's id
    on the hub. All but text, CSV and JSON lines need the extra ``datasets``. Prompts stay on the
    disk. Default: those of the bundled model."""
    caption_column: Text | None = None
    """Column of a data set. Default: the first of text, caption, prompt and txt that exists."""
    prompts_split: Text = "train"
    """Split of a data set."""
    skip_missing_captions: bool = False
    """Skip the rows of a data set that have no text, instead of refusing them, and count them."""
    validation_prompts: Text | None = None
    """Held-out prompts for validation; a text file, or a data set with the same column and split.
    Default: the bundled model's, or the first 64 training prompts of your own."""
    cache_embeddings: Text | None = None
    """Folder of embeddings. Every prompt, those of validation among them, is encoded once, before
    training, and the text encoders are then freed. A second run finds the embeddings there.
    Default: texts are encoded during training."""
    resolutions: tuple[Resolution, ...] = ()
    """Sizes of images in pixels, such as ``1024x1024 832x1216``, width first. Every micro-batch
    draws one; validation measures at the first and writes images of all. Default: the size of the
    pipeline alone."""
    num_frames: PositiveInt | None = None
    """Frames of a video, for pipelines of videos: 1 more than a multiple of the frames of a
    latent, which are 4 for Wan and 8 for LTX-Video. Memory and time grow with it. Default: the
    number of the pipeline."""
    offload_text_encoders: bool = False
    """With ``--cache_embeddings``: keep the text encoders in the memory of the CPU and move them to
    the accelerator layer by layer, by diffusers' group offloading."""
    train_finetunes: tuple[Text, ...] = ()
    """Fine-tunes of the base to train on beside it, so that the guide works better on others:
    folders or hub ids of pipelines, or folders of denoisers or LoRAs. Bundled ones are given by
    name: noto-v1, fxemoji, contours, flat, lit; on sd3 as sd3-noto-v1 and so on."""
    finetune_prob: Probability = 0.5
    """Probability that a training step uses a fine-tune in place of the base."""
    train_batch_size: PositiveInt = 64
    """Training samples of each process in a micro-batch."""
    max_train_steps: PositiveInt = 4000
    """Optimizer steps."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate. Default: the guide type's own."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
        "constant_with_warmup",
    ] = "cosine"  # fmt: skip
    """Schedule of the learning rate, as in diffusers."""
    lr_warmup_steps: NonNegativeInt = 100
    """Optimizer steps in which the learning rate rises to its peak."""
    adam_weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of a larger norm are clipped to it."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches in an optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    base_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the frozen denoiser and text encoders; the guide is trained in float32 in any
    case. fp16 needs ``--mixed_precision fp16``, which scales the gradients."""
    base_quantization: Quantization = "no"
    """Weights of the frozen denoiser in fewer bits. fp8: by diffusers' layerwise casting, all but
    norms and convolutions. int8, nf4: linear layers by bitsandbytes (the extra ``8bit``).
    int8-torchao: by torchao. fp8 and int8-torchao save memory with ``--gradient_checkpointing``
    only. The guide fits the plain base as well."""
    use_8bit_adam: bool = False
    """Adam's moments in eight bits, by bitsandbytes (the extra ``8bit``)."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of autocast, by accelerate."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the exponential moving average of the guide's weights. The average is saved."""
    guidance_scale_min: Annotated[float, Field(ge=1)] = 1.0
    """Lowest guidance scale w; 1 is no guidance."""
    guidance_scale_max: float = 8.0
    """Highest guidance scale w. Each sample draws its own, uniformly between the two."""
    negative_prompt_prob: Probability = 0.0
    """Probability that a sample has another prompt as negative prompt, in place of the null
    prompt."""
    refresh_prob: Probability = 0.85
    """Probability that a trajectory has refreshes: steps with both passes, whose difference the
    tiny guide is given in the steps after them. Samples after a refresh are weighted. Set 0 for a
    guide that does not use refreshes. No effect with --training_samples noised, nor with
    --weak_model, which a refresh would need."""
    first_step_refresh_prob: Probability = 0.0
    """Probability that the first refresh of a trajectory that has some is its first step, in place
    of a random one. With a negative prompt that step says most. No effect with --refresh_prob 0."""
    on_policy_ratio: Probability = 0.5
    """Ratio of the trajectories that the student samples itself, where training is on-policy."""
    streams: PositiveInt | None = None
    """Random streams of training samples, divided among the processes. Default: one per process,
    or those of the checkpoint. A fixed number, divisible by the number of processes, gives the
    same guide on any number of processes."""
    pool: PositiveInt = 1024
    """Latents being sampled at once in every stream: on the base, and as many on all fine-tunes
    together, but at least two batches on each, and of each size."""
    replay_capacity: PositiveInt = 8192
    """Samples kept with the teacher's predictions, in every stream, for all models together."""
    replay_reuse: PositiveInt = 1
    """Training steps per new batch of samples. 1 runs the teacher at every step; more is faster,
    but overfits the sampled trajectories."""
    checkpointing_steps: PositiveInt = 500
    """Steps between checkpoints."""
    checkpoints_total_limit: PositiveInt | None = 2
    """Checkpoints to keep; None keeps all."""
    resume_from_checkpoint: Text | None = None
    """``latest`` or a checkpoint's folder. The result is the same, bit for bit, as without the
    interruption."""
    validation_steps: PositiveInt = 500
    """Steps between validations."""
    num_validation_images: PositiveInt = 4
    """Validation prompts, at most 16, whose images are written at every validation, in columns:
    without guidance, with CFG, with the guide; in stage 2 of the teacher and of the guide."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "tensorboard"
    """Where losses and validations are logged."""
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0

    def __post_init__(self) -> None:
        if self.guidance_scale_max < max(self.guidance_scale_min, 1 + 1e-6):
            raise ConfigError(
                "guidance_scale_max must be above 1 and at least guidance_scale_min, not "
                f"{self.guidance_scale_max}"
            )
        if self.base_dtype == "fp16" and self.mixed_precision != "fp16":
            raise ConfigError("base_dtype must be bf16 or fp32 without --mixed_precision fp16")
        if self.offload_text_encoders and self.cache_embeddings is None:
            raise ConfigError("offload_text_encoders has no effect without --cache_embeddings")
        if self.base_quantization != "no" and self.train_finetunes:
            raise ConfigError(
                f"train_finetunes must be empty with --base_quantization {self.base_quantization}: "
                "fine-tunes are mixed with the weights of the base, which are quantised"
            )
        if len(set(self.resolutions)) < len(self.resolutions):
            raise ConfigError(f"resolutions must differ, not {' '.join(self.resolutions)}")
        if self.pool < self.train_batch_size:
            raise ConfigError(
                f"pool must be at least train_batch_size, {self.train_batch_size}, not {self.pool}"
            )

    def save(self, path: Path) -> None:
        """Write as JSON; :meth:`load` and ``--config`` read it."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Some settings by their names, from a JSON file, or a TOML file by its name.

        Raises:
            ConfigError: the file cannot be read, or a field is unknown or invalid.
        """
        try:
            text = path.read_text(encoding="utf-8")
            values: dict[str, Any] = _tuples(
                tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
            )
            made = cls(**{"output": "", **values})
            return {name: getattr(made, name) for name in values}
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"no configuration could be read from {path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """The settings of a file that :meth:`save` wrote, or of one with an ``output``.

        Raises:
            ConfigError: as of :meth:`read`, or there is no ``output``.
        """
        values = cls.read(path)
        if "output" not in values:
            raise ConfigError(f"{path}: output is required")
        return cls(**values)


@config_dataclass
class DistillConfig(TrainingConfig):
    """Settings of stage 1."""

    guide_type: Text = "tiny"
    """tiny: extrapolates text, attention and modulation and adds low-rank layers and a head; by
    default at most 1 % of the denoiser, where rank 1 allows it. external: the paper's small side
    network. full: a copy of the encoder. With the package ``baselines`` also agd, agd-attention,
    dice, cfg-lora and guided-distillation; dice and cfg-lora learn one scale,
    ``--trained_scale``."""
    guide: Any = None
    """Settings of the guide, of its type's settings class. Default: that class's defaults."""
    teacher: Guidance = CFG
    """Settings of the guidance that the guide is taught."""
    init_from: Text | None = None
    """A guide to train further: a folder, hub id or the name of a bundled one. Type and settings
    are taken from it; values other than the defaults must agree, but for the guidance: a guide that
    was taught one may be taught another. Default: a new guide."""
    training_samples: Literal["noised", "trajectory", "on_policy", "tracking"] = "trajectory"
    """noised: noised images. trajectory: the teacher's CFG trajectories. on_policy: trajectories
    that the student samples in part. tracking: trajectories that the student samples; it is
    trained to stay on those of CFG from the same noise."""
    train_images: Text | None = None
    """Folder with metadata.jsonl, for ``--training_samples noised``; needed there with a base of
    your own. Default: the bundled images."""
    trajectory_steps_min: PositiveInt = 8
    """Fewest sampling steps of a training trajectory."""
    trajectory_steps_max: PositiveInt = 32
    """Most sampling steps of a training trajectory."""

    @field_validator("guide_type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value not in Guide.registry:
            raise ValueError(f"must be one of {', '.join(Guide.registry)}")
        return value

    @field_validator("guide")
    @classmethod
    def _guide_settings(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.data.get("guide_type")
        return value if name is None else guide_settings(name, value)

    @field_validator("teacher", mode="before")
    @classmethod
    def _teacher(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            return Guidance(**vars(_validating(Guidance)(**_tuples(value))))
        except ValidationError as error:
            raise ConfigError(first_error(error)) from error

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guide is None:
            object.__setattr__(self, "guide", guide_settings(self.guide_type, None))
        if hasattr(self.guide, "trained_scale"):
            self._set_single_scale(self.guide.trained_scale)
        if self.resolutions and self.training_samples == "noised":
            raise ConfigError(
                "resolutions must be empty with --training_samples noised, whose images have the "
                "size of the pipeline"
            )
        if self.trajectory_steps_min > self.trajectory_steps_max:
            raise ConfigError(
                "trajectory_steps_min must be at most trajectory_steps_max, "
                f"{self.trajectory_steps_max}, not {self.trajectory_steps_min}"
            )

    def _set_single_scale(self, scale: float) -> None:
        """Train at one scale, given as the guide's setting or as both ends of the range."""
        low, high = self.guidance_scale_min, self.guidance_scale_max
        if (low, high) == (1.0, 8.0):  # the defaults
            low = high = scale
        if low != high or scale not in (high, type(self.guide)().trained_scale):
            raise ConfigError(
                f"guidance_scale_min and guidance_scale_max must be the trained_scale for "
                f"{self.guide_type}, {scale}, not {low} and {high}"
            )
        object.__setattr__(self, "guidance_scale_min", high)
        object.__setattr__(self, "guidance_scale_max", high)
        object.__setattr__(self, "guide", replace(self.guide, trained_scale=high))


@config_dataclass
class StepsConfig(TrainingConfig):
    """Settings of stage 2."""

    guide: Text | None = None
    """The guide to begin with, from stage 1: a folder, hub id or the name of a bundled one.
    Default: that of the bundled base."""
    teacher: Literal["guide", "cfg"] = "guide"
    """guide: the teacher is the guide that the round begins with, one pass a step, as in the paper.
    cfg: the teacher is CFG, or what the guide was taught in its place, with all passes in each
    step, so errors of the guide are not inherited."""
    teacher_scale_multiplier: PositiveFloat = 1.0
    """With ``--teacher cfg``, the teacher's guidance scale is ``1 + multiplier (w - 1)``. Under
    uncertainty an MSE-trained guide predicts the conditional mean, so it under-guides; more than 1
    counteracts that. Measure both retrieval accuracy and fd_clip, as for a larger w."""
    steps: tuple[PositiveInt, ...] = (16, 8, 4)
    """Sampling steps after each round; each is half of the one before. The first round's teacher
    takes twice as many."""
    max_train_steps: PositiveInt = 1000
    """Optimizer steps of each round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.steps or any(a != 2 * b for a, b in pairwise(self.steps)):
            raise ConfigError(
                f"steps must be a list of numbers, each half of the one before, not {self.steps}"
            )
        if self.teacher == "guide" and self.teacher_scale_multiplier != 1:
            raise ConfigError(
                "teacher_scale_multiplier must be 1 unless the teacher is cfg, not "
                f"{self.teacher_scale_multiplier}"
            )


def sides(resolution: str) -> tuple[int, int]:
    """(width, height) of ``WIDTHxHEIGHT``."""
    width, height = map(int, resolution.split("x"))
    return width, height


def guide_settings(guide_type: str, value: Any) -> Any:
    """Validated settings of a guide type, from an instance, a mapping or None (the defaults).

    Raises:
        ConfigError: a field is unknown or invalid.
    """
    kind: Any = Guide.registry[guide_type].settings_class
    if is_dataclass(value) and not isinstance(value, kind):
        raise ConfigError(
            f"guide must be {kind.__name__} for guide_type {guide_type}, not {type(value).__name__}"
        )
    given = vars(value) if isinstance(value, kind) else ({} if value is None else value)
    if not isinstance(given, Mapping):
        raise ConfigError(f"guide must be settings of {guide_type}, not {given!r}")
    try:
        made = kind(**vars(_validating(kind)(**_tuples(given))))
    except ValidationError as error:
        raise ConfigError(first_error(error)) from error
    for name, number in vars(made).items():
        if isinstance(number, int | float) and number < 0:
            raise ConfigError(f"{name} must be at least 0, not {number}")
    return made


@cache
def _validating(kind: type[Any]) -> Any:
    """A subclass that validates: the core, which has the settings classes, needs no pydantic."""
    return pydantic_dataclass(kind, frozen=True, config=RULES)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> str:
    """The entries of ``expected`` that ``found`` has otherwise, in words; empty if there are none.
    Where ``guide_type`` differs, nothing else is named."""
    names = [name for name, value in expected.items() if value != found.get(name)]
    if "guide_type" in names:
        names = ["guide_type"]
    return "; ".join(
        f"{n} is {found.get(n)} in the {where}, {expected[n]} in the configuration" for n in names
    )


def changed(config: Any, *names: str) -> dict[str, Any]:
    """The named fields, or all, of a dataclass whose values are not the defaults."""
    return {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if (not names or f.name in names) and getattr(config, f.name) != f.default
    }


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
