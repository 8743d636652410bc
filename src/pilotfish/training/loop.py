"""The training loop of every stage: a guide learns beside its frozen base.

What is learnt is a stage's own: where its states come from, its loss, its validation
(:mod:`pilotfish.training.guidance_stage`, :mod:`pilotfish.training.step_stage`).

Whatever is drawn at random comes from the streams (:mod:`pilotfish.training.streams`), and
everything else that changes is in the checkpoint. So a resumed run does what an uninterrupted
one would have done, to the same weights, and several processes do what one would have done.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from tqdm import tqdm

from pilotfish.backbones import Origin
from pilotfish.conditioning import some_or_one
from pilotfish.errors import Interrupted
from pilotfish.guidance import draw_guidance_scales
from pilotfish.guides import Guide
from pilotfish.interface import TextConditions
from pilotfish.teacher import checkpoint_in_pass, checksum
from pilotfish.training.checkpoints import list_checkpoints, save_whole
from pilotfish.training.config import ConfigError, TrainingConfig
from pilotfish.training.learner import Learner
from pilotfish.training.material import Material
from pilotfish.training.pool import Pool
from pilotfish.training.practice import PracticeHosts
from pilotfish.training.precision import BASE_DTYPES, slowed_by
from pilotfish.training.record import Record
from pilotfish.training.saving import Saving
from pilotfish.training.sharding import check, is_shared_out
from pilotfish.training.signals import stop_requested
from pilotfish.training.states import Source, States
from pilotfish.training.streams import FIRST, Streams, generator, share_out, shared_draws
from pilotfish.training.validation import Validation

SAME_SCALE = 0.5
"""Share of the samples that are trained at the scale at which they were being sampled:
what the guide will meet. The rest get a scale of their own."""

PATIENCE = timedelta(hours=6)
"""How long processes wait for the first, which validates alone."""


class DistillError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


class Distillation:
    """One run of a stage; a stage is a subclass.

    Args:
        config: the settings.
        material: base pipeline, prompts, pictures.
        guide: the guide to train.
        notice: called with a line of text worth showing to a person.
    """

    measure: ClassVar[str]
    """What the stage brings down from 1, the untrained student, towards 0."""
    decisive: ClassVar[tuple[str, ...]] = ("practice", "negative_share")
    """Settings that must be the same where a checkpoint is gone on with."""
    rate_factor: ClassVar[float] = 1.0
    """The learning rate as a share of the guide's own, where the settings name none."""

    def source(self, stream: int, host: int) -> Source:
        """Where the states of a stream come from on a host; host 0 is the base."""
        raise NotImplementedError

    def loss(
        self, guided: torch.Tensor, target: torch.Tensor, guidance_scale: torch.Tensor,
        states: States,
    ) -> torch.Tensor:  # fmt: skip
        """The stage's loss, a scalar, of (N, C, h, w) predictions at scales (N,)."""
        raise NotImplementedError

    def validation(self) -> Validation:
        """What is measured on held-out prompts."""
        raise NotImplementedError

    def __init__(
        self, config: TrainingConfig, material: Material, guide: Guide,
        notice: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        self.config, self.material, self.guide, self.notice = config, material, guide, notice
        self.folder = Path(config.output_dir)
        self.each = config.train_batch_size  # states of a stream in a tick; several share them
        report = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=report,
            project_config=ProjectConfiguration(str(self.folder), str(self.folder / "logs")),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        check(self.accelerator)
        if warning := slowed_by(config.mixed_precision, self.accelerator.device):
            notice(warning)
        material.hold_in(BASE_DTYPES[config.base_dtype])
        self.unet = material.pipe.to(self.accelerator.device).unet
        self.teacher = material.teacher()
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing(checkpoint_in_pass)
        self.base_checksum = checksum(self.unet)
        if (origin := Origin.of(self.unet)) is not None:
            guide.register_to_config(trained_on=origin.plain())
        self.practice = PracticeHosts(
            self.unet, material.fine_tunes(config.practice), config.practice_share
        )
        rate = config.learning_rate or guide.learning_rate * self.rate_factor
        student = material.student(guide)
        self.hooks = [student.hooks]
        self.learner = Learner(student, config, rate, self.accelerator)
        self.record = Record(self.measure)
        self.saving = Saving(
            self.folder, self.accelerator, self.learner, self.record,
            base_checksum=self.base_checksum, what=self._what(),
            limit=config.checkpoints_total_limit,
        )  # fmt: skip

    # -- states -------------------------------------------------------------------------

    def _streams(self, found: Path | None) -> Streams:
        """Those of this process."""
        config, accelerator = self.config, self.accelerator
        number = self.saving.number_of_streams(config.streams, found)
        own = share_out(number, accelerator.num_processes, accelerator.process_index)
        self.each = config.train_batch_size // len(own)
        return Streams(
            own, config.seed, batch=config.train_batch_size, hosts=len(self.practice),
            source=self.source, capacity=config.replay_capacity, reuse=config.replay_reuse,
        )  # fmt: skip

    def pool(self, stream: int, host: int, steps: tuple[int, int], student_share: float) -> Pool:
        """Latents on their way, over all prompts of the material."""
        config, material = self.config, self.material
        size = config.pool
        if host > 0:  # whose turn comes seldom: few latents, or none of them gets anywhere
            others = len(self.practice) - 1
            size = min(size, max(2 * self.each, size // others))
        return Pool(
            len(material.prompts), material.latent_shape,
            (config.guidance_scale_min, config.guidance_scale_max), size=size, steps=steps,
            train_timesteps=len(material.schedule.alphas_cumprod),
            generator=generator(config.seed, stream, FIRST), student_share=student_share,
            negative_share=config.negative_share,
        )  # fmt: skip

    def texts(
        self, prompt: torch.Tensor, negative: torch.Tensor
    ) -> tuple[TextConditions, TextConditions]:
        """Both, by their indices, as a student takes them."""
        prompts = self.material.texts
        return prompts(prompt), some_or_one(prompts, negative)

    @torch.no_grad()
    def own_prediction(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor, w: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """What the student predicts as it stands, without gradient.

        Raises:
            ConfigError: FSDP has shared it out: all processes would have to ask, and they have
                such states at different times.
        """
        if is_shared_out(self.guide):
            raise ConfigError(
                "under FSDP the student cannot step states by itself; use plain processes, or in "
                "stage 1 --states trajectory"
            )
        student = self.accelerator.unwrap_model(self.learner.student)
        prediction: torch.Tensor = student(latents, timestep, *self.texts(prompt, negative), w)
        return prediction.float()

    # -- training -----------------------------------------------------------------------

    def run(self) -> Guide:
        """Train to ``max_train_steps``; save the averaged guide; return it.

        Raises:
            DistillError: the loss is not finite, or the base has changed.
            Interrupted: SIGTERM or Ctrl-C; a checkpoint was saved first.
        """
        self._check_folder()
        try:
            found = self.saving.found(self.config.resume, self.notice)
            self.streams = self._streams(found)
            self.validating = self.validation()
            if found is not None:
                self.saving.load(found, self.streams)
                self.notice(f"resumed from {found} at step {self.record.step}")
            self._begin()
            self._train()
            self.practice.wear(0)
            if checksum(self.unet) != self.base_checksum:
                raise DistillError("the base denoiser changed during training; this is a bug")
            self._finish()
        finally:
            self.practice.wear(0)
            for hooks in self.hooks:
                hooks.remove()
            # not end_training: it parts the processes as well, which may have another round to do
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return self.guide

    def _check_folder(self) -> None:
        """Refuse a folder that holds another run."""
        if self.config.resume is None and list_checkpoints(self.folder):
            raise ConfigError(
                f"{self.folder} holds the checkpoints of an earlier run; --resume latest goes on "
                "with it, another --output_dir keeps it"
            )

    def _begin(self) -> None:
        """Write the settings, now that nothing has been refused; start the trackers."""
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            # whoever reads them begins a run of their own
            replace(self.config, resume=None).save(self.folder / "config.json")
        if self.accelerator.log_with:
            self.accelerator.init_trackers("pilotfish")

    def _train(self) -> None:
        config, accelerator, record = self.config, self.accelerator, self.record
        ticks = config.gradient_accumulation_steps
        bar = tqdm(
            initial=record.step, total=config.max_train_steps, desc="distil", mininterval=1.0,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        with stop_requested() as stop, bar:
            while record.step < config.max_train_steps:
                start = time.perf_counter()
                for tick in range(record.step * ticks, (record.step + 1) * ticks):
                    self._tick(tick)
                record.seconds += time.perf_counter() - start
                record.step += 1
                bar.update()
                bar.set_postfix_str(record.line(), refresh=False)
                if accelerator.log_with:
                    accelerator.log(dict(record.smooth), record.step)
                self._milestones(self._any(stop()))

    def _any(self, mine: bool) -> bool:
        """Whether it is so in any process: all must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return mine
        flag = torch.tensor(float(mine), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _tick(self, tick: int) -> None:
        host = self.practice.draw(shared_draws(self.config.seed, tick))
        self.practice.wear(host)
        with self.accelerator.autocast():  # the teacher's passes
            states, w = self.streams.draw(host, tick, self._scales)
        states, w = states.to(self.accelerator.device), w.to(self.accelerator.device)
        with self.accelerator.accumulate(self.learner.student):
            texts = self.texts(states.prompt, states.negative)
            guided = self.learner.student(states.latents, states.timestep, *texts, w)
            target = states.target(w)
            loss = self.loss(guided, target, w, states)
            self._note(loss, guided, target, states)
            self.learner.learn(loss)

    def _scales(self, states: States, generator: torch.Generator) -> torch.Tensor:
        if not states.any_scale:
            return states.guidance_scale
        low, high = self.config.guidance_scale_min, self.config.guidance_scale_max
        drawn = draw_guidance_scales(len(states), low, high, generator)
        same = torch.rand(len(states), generator=generator) < SAME_SCALE
        return torch.where(same, states.guidance_scale, drawn)

    def _note(
        self, loss: torch.Tensor, guided: torch.Tensor, target: torch.Tensor, states: States
    ) -> None:
        with torch.no_grad():
            gap = (guided.float() - target).pow(2).mean()
            whole = (states.untrained - target).pow(2).mean()
            mine = torch.stack([loss.float(), gap, whole])
            value, *rest = self.accelerator.reduce(mine, "mean").tolist()
        if not math.isfinite(value):
            kept = list_checkpoints(self.folder)
            where = f"the last good checkpoint is {kept[-1].name}" if kept else "nothing was saved"
            raise DistillError(
                f"the loss became {value} at step {self.record.step + 1}; {where}. "
                "Lower --learning_rate or use --mixed_precision no"
            )
        self.record.note(value, *rest)

    # -- milestones ---------------------------------------------------------------------

    def _milestones(self, stopping: bool) -> None:
        config, step = self.config, self.record.step
        last = step == config.max_train_steps
        due = last or stopping or step % config.checkpointing_steps == 0
        if last or step % config.validation_steps == 0:
            try:
                self._validate()
            except Exception:  # no memory for its pictures, say; what was learnt is not lost for it
                if due or self.accelerator.num_processes == 1:  # the others save as well, or none
                    self.saving.save(self.streams)
                raise
        if due:
            self.saving.save(self.streams)
        if stopping and not last:
            raise Interrupted(
                f"stopped at step {step}; run the same command with --resume latest to go on"
            )

    def _validate(self) -> None:
        self.accelerator.wait_for_everyone()
        guide = self.learner.averaged()
        if not self.accelerator.is_main_process:
            return
        self.practice.wear(0)
        step = self.record.step
        row = self.validating.run(guide, step, self.folder / "validation")
        self.record.validated(row, self.folder)
        if self.accelerator.log_with:
            self.accelerator.log({f"validation/{k}": v for k, v in row.items()}, step)
        name, value = next(iter(row.items()))
        on = "held out" if self.material.apart else "on training prompts"
        self.notice(f"step {step}: {name.replace('_', ' ')} {value:.3f} ({on})")

    def _finish(self) -> None:
        guide = self.learner.finish()
        if self.accelerator.is_main_process:
            config, processes = self.config, self.accelerator.num_processes
            batch = config.train_batch_size * config.gradient_accumulation_steps * processes
            self.record.finished(batch, self.folder)
            save_whole(guide, self.folder / "guide")
            self.notice(f"saved {self.folder / 'guide'}")

    def _what(self) -> dict[str, Any]:
        """What is trained, in plain JSON: a checkpoint of something else is refused."""
        asked = {name: getattr(self.config, name) for name in self.decisive}
        # of the base a checkpoint has the checksum, which no other name for it changes
        what = {"measure": self.measure, "kind": type(self.guide).__name__, **self.guide.settings()}
        plain: dict[str, Any] = json.loads(json.dumps(what | asked))
        return plain
