"""The training loop of both stages: a guide is trained against its frozen base.

A stage (:mod:`pilotfish.training.stages`) adds its source of samples, its loss and its validation.
All random draws come from the streams (:mod:`pilotfish.training.samples`), and everything else that
changes is in the checkpoint. So a resumed run gives the same weights as an uninterrupted one. With
a fixed ``--streams`` several processes give the same as one, up to the order of sums.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from tqdm import tqdm

from pilotfish.backbones import Origin
from pilotfish.conditioning import some_or_one
from pilotfish.data.prompts import fingerprint
from pilotfish.errors import Interrupted
from pilotfish.guidance import draw_guidance_scales
from pilotfish.guides import Guide
from pilotfish.interface import TextConditions
from pilotfish.teacher import checkpoint_in_pass, checksum
from pilotfish.training.checkpoint import (
    CheckpointManager,
    atomic_folder,
    find_checkpoint,
    list_checkpoints,
)
from pilotfish.training.config import ConfigError, TrainingConfig
from pilotfish.training.context import ImageSize, TrainingContext
from pilotfish.training.finetunes import FineTunes
from pilotfish.training.history import Progress
from pilotfish.training.pool import Pool
from pilotfish.training.samples import (
    BEFORE_TRAINING,
    Source,
    Streams,
    TrainingSamples,
    generator,
    own_streams,
    shared_generator,
)
from pilotfish.training.state import TrainState, is_sharded, make_accelerator
from pilotfish.training.validation import Validation

SAME_SCALE = 0.5
"""Probability that a sample is trained at the scale of its trajectory, as at inference. The others
draw another scale."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why and what is left on the disk."""


class Trainer:
    """One run of a stage; a stage is a subclass.

    Args:
        config: the settings.
        context: base pipeline, prompts, images.
        guide: the guide to train.
        log: called with each line of text for the user.
    """

    measure: ClassVar[str]
    """Name of the stage's relative error, 1 for an untrained student."""
    fixed_settings: ClassVar[tuple[str, ...]] = (
        "base_dtype", "base_quantization", "resolutions", "num_frames", "train_finetunes",
        "negative_prompt_prob", "refresh_prob", "first_step_refresh_prob",
    )  # fmt: skip
    """Settings that a resumed run must share."""
    rate_factor: ClassVar[float] = 1.0
    """Factor of the guide's own learning rate, where the settings have none."""

    def source(self, stream: int, model: int, size: ImageSize) -> Source:
        """The source of a stream's samples from a model, of one size; model 0 is the base."""
        raise NotImplementedError

    def target(self, samples: Any, w: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w), the student's target at scales (N,)."""
        raise NotImplementedError

    def loss(
        self, guided: torch.Tensor, target: torch.Tensor, w: torch.Tensor,
        samples: TrainingSamples,
    ) -> torch.Tensor:  # fmt: skip
        """The stage's loss, a scalar, of (N, C, h, w) predictions at scales (N,)."""
        raise NotImplementedError

    def validation(self) -> Validation:
        """The measurement on held-out prompts."""
        raise NotImplementedError

    def __init__(
        self, config: TrainingConfig, context: TrainingContext, guide: Guide,
        log: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.config, self.context, self.guide, self.log = config, context, guide, log
        self.folder = Path(config.output)
        self.stream_batch = config.train_batch_size
        self.accelerator = make_accelerator(config, log)
        context.use_resolutions(config.resolutions, config.num_frames)
        self.sizes = context.sizes
        self.base_sha256 = context.place(config, self.accelerator.device)
        self.finetunes = FineTunes(
            context.denoiser, context.fine_tunes(config.train_finetunes), config.finetune_prob
        )
        self.teacher = context.teacher(guide.guidance)  # encodes the prompts, which may take long
        if config.gradient_checkpointing:
            context.denoiser.enable_gradient_checkpointing(checkpoint_in_pass)
        plain = config.base_quantization == "no"
        self.placed_sha256 = self.base_sha256 if plain else checksum(context.denoiser)
        self.begun_sha256 = checksum(guide) if self.begins_trained else None
        if (origin := Origin.of(context.denoiser)) is not None:
            guide.register_to_config(trained_on=origin.plain())
        rate = config.learning_rate or guide.learning_rate * self.rate_factor
        student = context.student(guide)
        self.hooks = [student.hooks]
        self.state = TrainState(student, config, rate, self.accelerator)
        self.progress = Progress(self.measure)
        self.checkpoints = CheckpointManager(
            self.folder, self.accelerator, self.state, self.progress,
            base_sha256=self.base_sha256, begun_sha256=self.begun_sha256, settings=self._fixed(),
            limit=config.checkpoints_total_limit,
        )  # fmt: skip

    @property
    def begins_trained(self) -> bool:
        """Whether it begins with a trained guide, which a resumed run must share."""
        raise NotImplementedError

    # -- the training step ------------------------------------------------------------------

    def train_micro_batch(self, tick: int) -> None:
        """Draw samples, predict, and update the guide where gradients are complete."""
        config, accelerator, state = self.config, self.accelerator, self.state
        random = shared_generator(config.seed, tick)
        model, size = self.finetunes.draw(random), 0
        if len(self.sizes) > 1:
            size = int(torch.randint(len(self.sizes), (1,), generator=random))
        self.finetunes.activate(model)
        with accelerator.autocast():  # the teacher's passes
            place = model * len(self.sizes) + size
            samples, w = self.streams.draw(place, tick, self._draw_scales)
        samples, w = samples.to(accelerator.device), w.to(accelerator.device)
        with accelerator.accumulate(state.student):
            guided = self.predict(state.student, samples, w)
            target = self.target(samples, w)
            loss = self.loss(guided, target, w, samples)
            self._record(loss, guided, target, samples.untrained)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(self.guide.parameters(), config.max_grad_norm)
            state.optimizer.step()
            state.optimizer.zero_grad()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                state.lr_scheduler.step()
                state.ema.step(self.guide.parameters())

    def predict(self, student: Any, samples: Any, w: torch.Tensor) -> torch.Tensor:
        """The student's prediction at scales (N,)."""
        texts = self.texts(samples.prompt, samples.negative)
        guided: torch.Tensor = student(samples.latents, samples.time, *texts, w, samples.refresh)
        return guided

    def _draw_scales(self, samples: TrainingSamples, generator: torch.Generator) -> torch.Tensor:
        if not samples.any_scale:
            return samples.guidance_scale
        low, high = self.config.guidance_scale_min, self.config.guidance_scale_max
        drawn = draw_guidance_scales(len(samples), low, high, generator)
        same = torch.rand(len(samples), generator=generator) < SAME_SCALE
        return torch.where(same, samples.guidance_scale, drawn)

    def texts(
        self, prompt: torch.Tensor, negative: torch.Tensor
    ) -> tuple[TextConditions, TextConditions]:
        """The texts of indices (N,), as a student takes them."""
        prompts = self.context.texts
        return prompts(prompt), some_or_one(prompts, negative)

    def _record(
        self, loss: torch.Tensor, guided: torch.Tensor, target: torch.Tensor,
        untrained: torch.Tensor,
    ) -> None:  # fmt: skip
        with torch.no_grad():
            error = (guided.float() - target).pow(2).mean()
            untrained_error = (untrained - target).pow(2).mean()
            own = torch.stack([loss.float(), error, untrained_error])
            value, *rest = self.accelerator.reduce(own, "mean").tolist()
        if not math.isfinite(value):
            kept = list_checkpoints(self.folder)
            where = f"the last good checkpoint is {kept[-1].name}" if kept else "nothing was saved"
            raise TrainingError(
                f"the loss became {value} at step {self.progress.step + 1}; {where}. "
                "Lower --learning_rate or use --mixed_precision no"
            )
        self.progress.update(value, *rest)

    # -- the run ----------------------------------------------------------------------------

    def run(self) -> Guide:
        """Train to ``max_train_steps``; save the averaged guide; return it.

        Raises:
            ConfigError, CheckpointError: as of :func:`find_checkpoint`, or the checkpoint does not
                go with the run.
            TrainingError: the loss is not finite, or the base has changed.
            Interrupted: SIGTERM or Ctrl-C; a checkpoint was saved first.
        """
        try:
            found = find_checkpoint(self.folder, self.config.resume_from_checkpoint)
            if found is None and self.config.resume_from_checkpoint is not None:
                self.log(f"no checkpoint in {self.folder}; starting from the beginning")
            self.streams = self.make_streams(found)
            if found is not None:
                self.checkpoints.load(found, self.streams)
                self.log(f"resumed from {found} at step {self.progress.step}")
            self.validating = self.validation()
            self._begin()
            self._train()
            self.finetunes.activate(0)
            if checksum(self.context.denoiser) != self.placed_sha256:
                raise TrainingError("the base denoiser changed during training; this is a bug")
            return self._finish()
        finally:
            self.finetunes.activate(0)
            for hooks in self.hooks:
                hooks.remove()
            # end_training would also end the process group, which another round needs
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def _begin(self) -> None:
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace(self.config, resume_from_checkpoint=None).save(self.folder / "config.json")
        if self.accelerator.log_with:
            self.accelerator.init_trackers("pilotfish")

    def _train(self) -> None:
        config, accelerator, progress = self.config, self.accelerator, self.progress
        ticks = config.gradient_accumulation_steps
        bar = tqdm(
            initial=progress.step, total=config.max_train_steps, desc="distill", mininterval=1.0,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        with stop_requests() as stop_requested, bar:
            while progress.step < config.max_train_steps:
                start = perf_counter()
                for tick in range(progress.step * ticks, (progress.step + 1) * ticks):
                    self.train_micro_batch(tick)
                progress.seconds += perf_counter() - start
                progress.step += 1
                bar.update()
                bar.set_postfix_str(progress.line(), refresh=False)
                if accelerator.log_with:
                    accelerator.log(dict(progress.smooth), progress.step)
                self._milestones(self._in_any_process(stop_requested()))

    def _milestones(self, stopping: bool) -> None:
        config, step = self.config, self.progress.step
        last = step == config.max_train_steps
        due = last or stopping or step % config.checkpointing_steps == 0
        if last or step % config.validation_steps == 0:
            try:
                self._validate()
            except Exception:  # out of memory, for example: keep the trained state
                if due or self.accelerator.num_processes == 1:  # all processes save, or none
                    self.checkpoints.save(self.streams)
                raise
        if due:
            self.checkpoints.save(self.streams)
        if stopping and not last:
            raise Interrupted(
                f"stopped at step {step}; run the same command with "
                "--resume_from_checkpoint latest to continue"
            )

    def _validate(self) -> None:
        self.accelerator.wait_for_everyone()
        guide = self.state.averaged_guide()
        if not self.accelerator.is_main_process:
            return
        self.finetunes.activate(0)
        step = self.progress.step
        row = self.validating.run(guide, step, self.folder / "validation")
        self.progress.add_validation(row, self.folder)
        if self.accelerator.log_with:
            self.accelerator.log({f"validation/{k}": v for k, v in row.items()}, step)
        name, value = next(iter(row.items()))
        on = "held out" if self.context.held_out else "on training prompts"
        self.log(f"step {step}: {name.replace('_', ' ')} {value:.3f} ({on})")

    def _finish(self) -> Guide:
        guide = self.state.finish()
        if self.accelerator.is_main_process:
            config, processes = self.config, self.accelerator.num_processes
            batch = config.train_batch_size * config.gradient_accumulation_steps * processes
            self.progress.finish(batch, self.folder, self.begun_sha256)
            with atomic_folder(self.folder / "guide") as aside:
                guide.save_pretrained(aside)
            self.log(f"saved {self.folder / 'guide'}")
        return guide

    def _in_any_process(self, own: bool) -> bool:
        """Whether it is true in any process: all must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return own
        flag = torch.tensor(float(own), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share, in plain JSON. The base is compared by its
        checksum and the prompts by theirs, not by their names."""
        fixed = {
            "measure": self.measure,
            "prompts": fingerprint(self.context.prompts),
            "guide_type": self.guide.guide_type,
            **self.guide.settings(),
        }
        fixed |= {name: getattr(self.config, name) for name in self.fixed_settings}
        plain: dict[str, Any] = json.loads(json.dumps(fixed))
        return plain

    # -- parts of a stage -------------------------------------------------------------------

    def make_streams(self, checkpoint: Path | None) -> Streams:
        """The streams of this process."""
        config, accelerator = self.config, self.accelerator
        count = self.checkpoints.stream_count(config.streams, checkpoint)
        own = own_streams(count, accelerator.num_processes, accelerator.process_index)
        self.stream_batch = config.train_batch_size // len(own)
        sizes = len(self.sizes)

        def source(stream: int, place: int) -> Source:
            return self.source(stream, place // sizes, self.sizes[place % sizes])

        return Streams(
            own, config.seed, batch=config.train_batch_size, sources=len(self.finetunes) * sizes,
            source=source, capacity=config.replay_capacity, reuse=config.replay_reuse,
        )  # fmt: skip

    def pool(
        self, stream: int, model: int, size: ImageSize, steps: tuple[int, int],
        on_policy_ratio: float,
    ) -> Pool:  # fmt: skip
        """A pool of latents over all training prompts."""
        config, context = self.config, self.context
        # drawn seldom: with many latents none would ever leave the noise
        others = max(1, len(self.finetunes) - 1) if model else 1
        count = max(2 * self.stream_batch, config.pool // (others * len(self.sizes)))
        return Pool(
            len(context.prompts), size.shape,
            (config.guidance_scale_min, config.guidance_scale_max), size=min(config.pool, count),
            steps=steps, path=size.path, generator=generator(config.seed, stream, BEFORE_TRAINING),
            on_policy_ratio=on_policy_ratio, negative_prompt_prob=config.negative_prompt_prob,
            refresh_prob=config.refresh_prob if self.teacher.weak is None else 0.0,
            first_step_refresh_prob=config.first_step_refresh_prob,
        )  # fmt: skip

    @torch.no_grad()
    def student_prediction(self, samples: TrainingSamples) -> torch.Tensor:
        """The student's present prediction, without gradient.

        Raises:
            ConfigError: the guide is sharded by FSDP: this pass would be a collective operation,
                and processes have on-policy samples at different times.
        """
        if is_sharded(self.guide):
            raise ConfigError(
                "on-policy samples are not supported under FSDP; use plain processes, or in "
                "stage 1 --training_samples trajectory"
            )
        student = self.accelerator.unwrap_model(self.state.student)
        return self.predict(student, samples, samples.guidance_scale).float()


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch SIGTERM and Ctrl-C; the function says whether one has come. A second Ctrl-C raises
    KeyboardInterrupt at once; a second SIGTERM does not, because launchers forward it."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        second = number == signal.SIGINT and number in received
        received.append(number)
        if second:
            raise KeyboardInterrupt

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
