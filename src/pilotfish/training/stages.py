"""The two stages, from settings to trained guides.

Stage 1 trains a guide on equation (1): one pass in place of two. Stage 2 is progressive
distillation (Salimans & Ho, arXiv 2202.00512) of the guided one-pass model: the number of steps
halves from round to round. The base stays frozen and w stays an input.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from pilotfish import bundled
from pilotfish.backbones import Origin
from pilotfish.guidances import CFG
from pilotfish.guides import Guide
from pilotfish.interface import Refresh
from pilotfish.noise import NoisePath
from pilotfish.teacher import checksum
from pilotfish.training.checkpoint import find_checkpoint
from pilotfish.training.config import (
    ConfigError,
    DistillConfig,
    StepsConfig,
    changed,
    differences,
)
from pilotfish.training.context import ImageSize, TrainingContext
from pilotfish.training.history import begun_sha256
from pilotfish.training.samples import (
    GuidanceSamples,
    Source,
    StepSamples,
    TrackingSamples,
    TrainingSamples,
)
from pilotfish.training.trainer import Trainer
from pilotfish.training.trajectories import (
    CFGTrajectories,
    HalvedTrajectories,
    NoisedImages,
    TrackedTrajectories,
)
from pilotfish.training.validation import GuidanceValidation, StepValidation


class GuidanceTrainer(Trainer):
    """One run of stage 1."""

    config: DistillConfig
    measure = "guidance_error"
    fixed_settings = (*Trainer.fixed_settings, "training_samples")

    @property
    def begins_trained(self) -> bool:
        return self.config.init_from is not None

    def source(self, stream: int, model: int, size: ImageSize) -> Source:
        config, context = self.config, self.context
        if config.training_samples == "noised":
            scales = (config.guidance_scale_min, config.guidance_scale_max)
            return NoisedImages(
                self.teacher, context.path, *context.images, scales, len(context.prompts),
                config.negative_prompt_prob,
            )  # fmt: skip
        on_policy = config.training_samples == "on_policy"
        steps = (config.trajectory_steps_min, config.trajectory_steps_max)
        pool = self.pool(stream, model, size, steps, config.on_policy_ratio if on_policy else 0.0)
        student = self.student_prediction if on_policy else None
        if config.training_samples == "tracking":
            return TrackedTrajectories(self.teacher, size.path, pool, self.student_prediction)
        return CFGTrajectories(self.teacher, size.path, pool, student)

    def target(self, samples: GuidanceSamples, w: torch.Tensor) -> torch.Tensor:
        if isinstance(samples, TrackingSamples):
            return samples.goal
        return self.teacher.guided(samples.unconditional, samples.conditional, w)

    def loss(
        self, guided: torch.Tensor, target: torch.Tensor, w: torch.Tensor,
        samples: TrainingSamples,
    ) -> torch.Tensor:  # fmt: skip
        assert isinstance(samples, GuidanceSamples)
        difference = samples.conditional - samples.unconditional
        return guidance_loss(guided, target, w, freshness_weight(samples.refresh, difference))

    def validation(self) -> GuidanceValidation:
        return GuidanceValidation(self.config, self.context, self.teacher)


class StepTrainer(Trainer):
    """One round of stage 2.

    Args:
        initial: the guide that the student starts as a copy of. It is the teacher, with
            ``2 * steps`` steps, unless ``config.teacher`` is cfg.
        steps: the student's.

    Raises:
        ConfigError: the teacher was distilled to another number of steps.
        GuideError: the guide does not fit the base.
    """

    config: StepsConfig
    measure = "step_error"
    fixed_settings = (*Trainer.fixed_settings, "teacher", "teacher_scale_multiplier")
    rate_factor = 0.2  # the guide is already trained

    def __init__(
        self, config: StepsConfig, context: TrainingContext, initial: Guide, steps: int,
        log: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        context.use_deterministic_scheduler()
        context.use_resolutions(config.resolutions, config.num_frames)
        path = context.path
        initial.check(context.backbone.signature(path.prediction_type))
        teaches = config.teacher == "guide"
        if teaches and initial.times not in (None, times(path, 2 * steps)):
            raise ConfigError(
                f"the guide takes {len(initial.times or ())} steps; a student of {steps} "
                f"needs a teacher of {2 * steps}, or one that was not distilled to few steps"
            )
        self.steps = steps
        student = deepcopy(initial).requires_grad_(True)
        student.register_to_config(
            times=list(times(path, steps)),
            guidance_scale_range=(config.guidance_scale_min, config.guidance_scale_max),
            **({"refresh_ratio": 0.0} if "refresh_ratio" in initial.config else {}),
        )
        super().__init__(config, context, student, log)
        if any(times(size.path, steps) != student.times for size in self.sizes):
            raise ConfigError(
                "resolutions must be one in stage 2: this pipeline's steps lie at other times for "
                "other sizes, and a guide for few steps is trained at its own"
            )
        self.teacher_guide = initial.eval().requires_grad_(False) if teaches else None
        if self.teacher_guide is not None:
            self.teacher_pass = context.student(self.teacher_guide.to(self.accelerator.device))
            self.hooks.append(self.teacher_pass.hooks)

    @property
    def begins_trained(self) -> bool:
        return True

    def source(self, stream: int, model: int, size: ImageSize) -> Source:
        steps = (self.steps, self.steps)
        pool = self.pool(stream, model, size, steps, self.config.on_policy_ratio)
        return HalvedTrajectories(
            self.teach, self.teacher, size.path, pool, self.student_prediction
        )  # fmt: skip

    def predict(self, student: Any, samples: StepSamples, w: torch.Tensor) -> torch.Tensor:
        """The student's prediction, with both passes where they are due."""
        texts = self.texts(samples.prompt, samples.negative)
        guided: torch.Tensor = student(
            samples.latents, samples.time, *texts, w, samples.refresh, samples.due
        )
        return guided

    def target(self, samples: StepSamples, w: torch.Tensor) -> torch.Tensor:
        return samples.goal

    @torch.no_grad()
    def teach(
        self, latents: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor, w: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The teacher's guided prediction: its guidance with all passes, or a guide in one."""
        if self.teacher_guide is None:
            both = self.teacher(latents, time, prompt, negative)
            scale = 1 + self.config.teacher_scale_multiplier * (w - 1)
            return self.teacher.guided(*both, scale)
        made: torch.Tensor = self.teacher_pass(latents, time, *self.texts(prompt, negative), w)
        return made.float()

    def loss(
        self, guided: torch.Tensor, target: torch.Tensor, w: torch.Tensor,
        samples: TrainingSamples,
    ) -> torch.Tensor:  # fmt: skip
        path = self.context.path
        weight = torch.ones_like(w)
        if path.prediction_type == "epsilon":  # |v|^2 = |eps|^2 / alpha^2
            weight = path.alpha_sigma(samples.time)[0] ** -2
        return step_loss(guided, target, w, weight)

    def validation(self) -> StepValidation:
        return StepValidation(
            self.config, self.context, self.teacher, self.teacher_guide, self.steps
        )


def guidance_loss(
    guided: torch.Tensor, target: torch.Tensor, w: torch.Tensor, weight: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """Equation (2), ``||guided - cfg||^2``, divided by ``(w - 1)^2``: the distance between CFG and
    the conditional prediction grows with w - 1, so this weighs all scales alike.

    Args:
        weight: (N,) further weights.

    Returns:
        The mean over batch and elements, a scalar.
    """
    weight = weight * (w - 1).clamp(min=0.5) ** -2
    return (weight * (guided.float() - target).pow(2).flatten(1).mean(1)).mean()


LEAST = 0.02
"""Relative error of reuse below which a sample's weight grows no further."""


def freshness_weight(refresh: Refresh, difference: torch.Tensor) -> torch.Tensor:
    """(N,) weights that count all ages of a refresh alike: one over the relative error of reuse,
    ``||difference then - difference now||^2 / ||difference now||^2``, which is small where the
    refresh is fresh; 1 where reuse is of no use, and without a refresh.

    Args:
        difference: (N, C, h, w) the difference between the two predictions now.
    """
    error = (refresh.difference - difference).pow(2).flatten(1).mean(1)
    relative = error / difference.pow(2).flatten(1).mean(1).clamp(min=1e-12)
    return torch.where(refresh.known > 0, 1 / (relative.clamp(max=1) + LEAST), 1.0)


def step_loss(
    prediction: torch.Tensor, goal: torch.Tensor, w: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The squared distance to the goal, divided by w, with which it grows.

    Args:
        weight: (N,) that makes it the distance of velocities, which is the weighting ``SNR + 1``
            of arXiv 2202.00512, section 4: 1 for v and flow prediction, ``1 / alpha^2`` for
            epsilon.

    Returns:
        The mean over batch and elements, a scalar.
    """
    distance = (prediction.float() - goal).pow(2).flatten(1).mean(1)
    return (weight * distance / w).mean()


def distill(config: DistillConfig) -> Guide:
    """Stage 1; the guide is saved in ``output/guide``.

    Raises:
        ConfigError: the guide of ``init_from`` is of another type, or a setting that is not at its
            default differs from its own; and as :func:`find_checkpoint`.
        CheckpointError: ``resume_from_checkpoint`` names a folder that does not exist.
        GuideError: the guide of ``init_from`` cannot be read, or was made for another base.
    """
    # refuses before anything is loaded
    find_checkpoint(Path(config.output), config.resume_from_checkpoint)
    found = bundled.open_guide(config.init_from) if config.init_from else None
    if found is not None:
        config = with_settings_of(found, config)
    context = TrainingContext.from_config(config)
    if found is not None:
        fits = context.backbone.signature(context.path.prediction_type)
        found.check(fits, Origin.of(context.denoiser))
    guide = new_guide(config, context)
    if found is not None:
        same = found.settings() | {"teacher": guide.config.get("teacher")}
        if differs := differences(same, guide.settings(), "guide"):
            raise ConfigError(f"Cannot continue training {config.init_from}: {differs}.")
        guide.load_state_dict(found.state_dict())
    return GuidanceTrainer(config, context, guide).run()


def distill_steps(config: StepsConfig, initial: Guide) -> dict[int, Guide]:
    """Stage 2, all rounds; each guide is saved in ``output/steps-<n>/guide``. With
    ``resume_from_checkpoint``, finished rounds are not repeated.

    Args:
        initial: the guide to begin with, from stage 1.

    Returns:
        The guides by their number of steps.

    Raises:
        ConfigError: the folder holds an earlier run and ``resume_from_checkpoint`` is not set, or
            it names a checkpoint, though every round has its own; or a finished round had other
            settings, began with another guide or comes after one that is not finished.
        GuideError: the guide does not fit the base.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        raise ConfigError(
            "stage 2 resumes with --resume_from_checkpoint latest only, not "
            f"{config.resume_from_checkpoint}"
        )
    folders, guide = {n: Path(config.output) / f"steps-{n}" for n in config.steps}, initial
    if config.resume_from_checkpoint is None and any(
        folder.exists() for folder in folders.values()
    ):
        raise ConfigError(
            f"{config.output} holds rounds of an earlier run; "
            "--resume_from_checkpoint latest continues it, another --output keeps it"
        )
    unfinished: Path | None = None
    finished: dict[int, Guide] = {}
    for steps, folder in folders.items():
        if not (folder / "guide").is_dir():
            unfinished = unfinished or folder
            continue
        check_finished(folder, config, steps)
        if unfinished is not None:
            raise ConfigError(f"{folder} is finished, {unfinished} is not; delete the former")
        if begun_sha256(folder) not in (None, checksum(guide)):
            raise ConfigError(
                f"Cannot continue after {folder}: it began with other weights than the guide has "
                "now; give another --output, or delete this round's folder and those after it."
            )
        finished[steps] = guide = Guide.from_pretrained(folder / "guide")
    context, made = TrainingContext.from_config(config), {}
    for steps, folder in folders.items():
        if steps in finished:
            student = finished[steps]
        else:
            settings = replace(config, output=str(folder))
            student = StepTrainer(settings, context, initial, steps).run()
        made[steps] = initial = student
    return made


FREE = (
    "output", "resume_from_checkpoint", "steps", "report_to", "checkpointing_steps",
    "checkpoints_total_limit", "validation_steps", "validation_prompts", "num_validation_images",
    "gradient_checkpointing", "cache_embeddings", "offload_text_encoders",
)  # fmt: skip
"""Settings that do not change a finished round; of ``steps``, those after it."""


def check_finished(folder: Path, config: StepsConfig, steps: int) -> None:
    """Refuse a finished round that was trained with other settings.

    Raises:
        ConfigError: naming them, or the round's own cannot be read.
    """

    def relevant(some: StepsConfig) -> dict[str, Any]:
        until = some.steps[: some.steps.index(steps) + 1] if steps in some.steps else some.steps
        return {k: v for k, v in asdict(some).items() if k not in FREE} | {"steps": until}

    found = relevant(StepsConfig.load(folder / "config.json"))
    if differs := differences(found, relevant(config), "finished round"):
        raise ConfigError(
            f"Cannot continue after {folder}: {differs}; give the same settings or another "
            "--output."
        )


def new_guide(config: DistillConfig, context: TrainingContext) -> Guide:
    """A new guide of the configured type.

    Raises:
        ConfigError: it cannot say what it was taught, and that is not CFG.
    """
    torch.manual_seed(config.seed)
    settings: dict[str, Any] = asdict(config.guide)
    if (teacher := config.teacher.plain()) is not None:
        if "teacher" not in signature(Guide.registry[config.guide_type].__init__).parameters:
            raise ConfigError(
                f"a guide of type {config.guide_type} can only be taught CFG; use --guide_type tiny"
            )
        settings["teacher"] = teacher
    if "trained_scale" not in settings:
        settings["guidance_scale_range"] = (config.guidance_scale_min, config.guidance_scale_max)
    kind = Guide.registry[config.guide_type]
    return kind.for_denoiser(context.denoiser, context.path.prediction_type, **settings)


def with_settings_of(guide: Guide, config: DistillConfig) -> DistillConfig:
    """The configuration with the type and settings of a guide in place of defaults.

    Raises:
        ConfigError: a value that is not the default differs.
    """
    low, high = guide.guidance_scale_range
    names = [f.name for f in fields(guide.settings_class)]
    found = {name: guide.config[name] for name in names if name in guide.config}
    if "trained_scale" in found:
        low = high = found["trained_scale"]
    own: dict[str, Any] = {"guidance_scale_min": low, "guidance_scale_max": high}
    own["guide_type"] = guide.guide_type
    given = changed(config, *own) | changed(config.guide)
    given = {name: value for name, value in given.items() if name in own | found}
    if differs := differences(own | found, given, "guide"):
        raise ConfigError(f"Cannot continue training {config.init_from}: {differs}.")
    taught = guide.guidance if config.teacher == CFG else config.teacher
    return replace(config, **own, guide=found, teacher=taught)


def times(path: NoisePath, steps: int) -> tuple[float, ...]:
    """The normalised times of a guide with so many steps."""
    return tuple(path.grid(steps)[:-1].tolist())
