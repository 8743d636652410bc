"""The training loop of every stage: a guide learns beside its frozen base.

What is learnt is a stage's own: where its states come from, its loss, its validation
(:mod:`pilotfish.distill.guidance_stage`, :mod:`pilotfish.distill.step_stage`).

Every tick (one micro-batch) draws its randomness from a generator of its own, seeded by
(seed, process, tick), and everything else that changes is in the checkpoint. So a resumed
run does what an uninterrupted one would have done, to the same weights.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tqdm import tqdm

from pilotfish.distill.checkpoints import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    save_whole,
)
from pilotfish.distill.config import ConfigError, TrainingConfig
from pilotfish.distill.learner import Learner
from pilotfish.distill.material import Material
from pilotfish.distill.pool import Pool
from pilotfish.distill.practice import PracticeHosts
from pilotfish.distill.signals import stop_requested
from pilotfish.distill.states import Replay, Source, States
from pilotfish.distill.validation import Validation
from pilotfish.guidance import draw_guidance_scales
from pilotfish.guides import Guide
from pilotfish.passes import GuidedStudent, checkpoint_in_context, checksum
from pilotfish.pipelines import fine_tuned_weights

SAME_SCALE = 0.5
"""Share of the samples that are trained at the scale at which they were being sampled:
what the guide will meet. The rest get a scale of their own."""


class DistillError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


class Interrupted(DistillError):
    """Training was asked to stop and has saved its state."""


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
    rate_factor: ClassVar[float] = 1.0
    """The learning rate as a share of the guide's own, where the settings name none."""

    def source(self) -> Source:
        """Where the stage's states come from."""
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
        report = None if config.report_to == "none" else config.report_to
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=report,
            project_config=ProjectConfiguration(str(self.folder), str(self.folder / "logs")),
        )
        self.unet = material.pipe.to(self.accelerator.device).unet
        self.base = material.base()
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing(checkpoint_in_context)
        self.base_checksum = checksum(self.unet)
        fine_tunes = [fine_tuned_weights(self.unet, where) for where in config.practice]
        self.practice = PracticeHosts(self.unet, fine_tunes, config.practice_share)
        rate = config.learning_rate or guide.learning_rate * self.rate_factor
        student = GuidedStudent(guide, self.unet)
        self.hooks = [student.hooks]
        self.learner = Learner(student, config, rate, self.accelerator)
        self.step = self.micro = 0
        self.seconds = 0.0  # spent on training steps, the teacher's passes among them
        self.history: list[dict[str, float]] = []
        self.smooth: dict[str, float] = {}

    @property
    def _words(self) -> str:
        return self.measure.replace("_", " ")

    # -- states -------------------------------------------------------------------------

    def _generator(self, tick: int) -> torch.Generator:
        process = self.accelerator.process_index
        return torch.Generator().manual_seed((self.config.seed * 64 + process) * 10**9 + tick)

    def pool(self, steps: tuple[int, int], student_share: float) -> Pool:
        """Latents on their way, over all prompts of the material."""
        config, material = self.config, self.material
        return Pool(
            len(material.prompts), material.latent_shape,
            (config.guidance_scale_min, config.guidance_scale_max), size=config.pool, steps=steps,
            train_timesteps=len(material.schedule.alphas_cumprod),
            generator=self._generator(10**9 - 1), student_share=student_share,
            negative_share=config.negative_share,
        )  # fmt: skip

    def texts(
        self, prompt: torch.Tensor, negative: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder hidden states of both, by their indices, as a student takes them."""
        return self.base.texts(prompt), self.base.negatives(negative)

    @torch.no_grad()
    def own_prediction(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor, w: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """What the student predicts as it stands, without gradient."""
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
        self._begin()
        try:
            capacity = self.config.replay_capacity // len(self.practice)
            self.replays = [
                Replay(self.source(), capacity, self.config.replay_reuse)
                for _ in range(len(self.practice))
            ]
            self.validating = self.validation()
            self._resume()
            self._train()
            self.practice.wear(0)
            if checksum(self.unet) != self.base_checksum:
                raise DistillError("the base denoiser changed during training; this is a bug")
            self._finish()
        finally:
            self.practice.wear(0)
            for hooks in self.hooks:
                hooks.remove()
            if self.accelerator.log_with:
                self.accelerator.end_training()
        return self.guide

    def _begin(self) -> None:
        """Refuse a folder that holds another run; write the settings; start the trackers."""
        if self.config.resume is None and list_checkpoints(self.folder):
            raise ConfigError(
                f"{self.folder} holds the checkpoints of an earlier run; --resume latest goes on "
                "with it, another --output_dir keeps it"
            )
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.config.save(self.folder / "config.json")
        if self.accelerator.log_with:
            self.accelerator.init_trackers("pilotfish")

    def _train(self) -> None:
        config, accelerator = self.config, self.accelerator
        bar = tqdm(
            initial=self.step, total=config.max_train_steps, desc="distil", mininterval=1.0,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        with stop_requested() as stop, bar:
            while self.step < config.max_train_steps:
                start = time.perf_counter()
                for _ in range(config.gradient_accumulation_steps):
                    self._tick()
                self.seconds += time.perf_counter() - start
                self.step += 1
                bar.update()
                bar.set_postfix_str(
                    f"loss {self.smooth['loss']:.4f}  {self._words} "
                    f"{self.smooth[self.measure]:.3f}", refresh=False,
                )  # fmt: skip
                if accelerator.log_with:
                    accelerator.log(dict(self.smooth), self.step)
                self._milestones(stop())

    def _tick(self) -> None:
        config = self.config
        tick = self.step * config.gradient_accumulation_steps + self.micro
        generator = self._generator(tick)
        host = self.practice.draw(generator)
        self.practice.wear(host)
        with self.accelerator.autocast():  # the teacher's passes
            states = self.replays[host].draw(config.train_batch_size, tick, generator)
        w = self._scales(states, generator).to(self.accelerator.device)
        states = states.to(self.accelerator.device)
        with self.accelerator.accumulate(self.learner.student):
            texts = self.texts(states.prompt, states.negative)
            guided = self.learner.student(states.latents, states.timestep, *texts, w)
            target = states.target(w)
            loss = self.loss(guided, target, w, states)
            self._note(loss, guided, target, states)
            self.learner.learn(loss)
        self.micro = (self.micro + 1) % config.gradient_accumulation_steps

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
        value = float(loss.detach())
        if not math.isfinite(value):
            kept = list_checkpoints(self.folder)
            where = f"the last good checkpoint is {kept[-1].name}" if kept else "nothing was saved"
            raise DistillError(
                f"the loss became {value} at step {self.step + 1}; {where}. "
                "Lower --learning_rate or use --mixed_precision no"
            )
        with torch.no_grad():
            gap = (guided.detach().float() - target).pow(2).sum()
            whole = (states.untrained - target).pow(2).sum()
        for name, new in (("loss", value), ("gap", float(gap)), ("whole", float(whole))):
            old = self.smooth.get(name, new)
            self.smooth[name] = 0.98 * old + 0.02 * new
        self.smooth[self.measure] = self.smooth["gap"] / max(self.smooth["whole"], 1e-12)

    # -- milestones ---------------------------------------------------------------------

    def _milestones(self, stopping: bool) -> None:
        config = self.config
        last = self.step == config.max_train_steps
        if last or self.step % config.validation_steps == 0:
            self._validate()
        if last or stopping or self.step % config.checkpointing_steps == 0:
            self.save()
        if stopping and not last:
            raise Interrupted(
                f"stopped at step {self.step}; run the same command with --resume latest to go on"
            )

    def _validate(self) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        self.practice.wear(0)
        with self.learner.averaged() as guide:
            row = self.validating.run(guide, self.step, self.folder / "validation")
        name, value = next(iter(row.items()))
        row = {"step": self.step, "loss": self.smooth["loss"], **row}
        self.history.append(row)
        (self.folder / "history.json").write_text(json.dumps(self.history, indent=1) + "\n")
        if self.accelerator.log_with:
            self.accelerator.log({f"validation/{k}": v for k, v in row.items()}, self.step)
        self.notice(f"step {self.step}: {name.replace('_', ' ')} {value:.3f} (held out)")

    def _finish(self) -> None:
        guide = self.learner.finish()
        if self.accelerator.is_main_process:
            config, processes = self.config, self.accelerator.num_processes
            batch = config.train_batch_size * config.gradient_accumulation_steps * processes
            took = {"steps": self.step, "samples": self.step * batch, "seconds": self.seconds}
            (self.folder / "training.json").write_text(json.dumps(took, indent=1) + "\n")
            save_whole(guide, self.folder / "guide")
            self.notice(f"saved {self.folder / 'guide'}")

    # -- checkpoints --------------------------------------------------------------------

    def _own_folder(self) -> Path:
        """Where this process keeps its replay ring; the first one's goes with the weights."""
        return self.folder / f"process-{self.accelerator.process_index}"

    def save(self) -> None:
        """Write a checkpoint: weights, average, optimiser, states, history."""
        accelerator = self.accelerator
        rings = {
            f"replay.{i}.{k}": v
            for i, replay in enumerate(self.replays)
            for k, v in replay.tensors().items()
        }
        limit = self.config.checkpoints_total_limit
        if not accelerator.is_main_process:
            save_checkpoint(self._own_folder(), self.step, rings, {})
            prune_checkpoints(self._own_folder(), limit)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            tensors = self.learner.tensors() | rings
            facts = self.learner.facts() | {
                "history": self.history, "smooth": self.smooth,
                "base_checksum": self.base_checksum, "what": self._what(),
                "seconds": self.seconds,
            }  # fmt: skip
            save_checkpoint(self.folder, self.step, tensors, facts)
            prune_checkpoints(self.folder, limit)
        accelerator.wait_for_everyone()

    def _resume(self) -> None:
        if self.config.resume is None:
            return
        if self.config.resume == "latest":
            found = list_checkpoints(self.folder)
            if not found:
                self.notice(f"no checkpoint in {self.folder}; starting from the beginning")
                return
            path = found[-1]
        else:
            path = Path(self.config.resume)
        checkpoint = load_checkpoint(path)
        if checkpoint.facts.get("base_checksum") != self.base_checksum:
            raise ConfigError(f"{path} was trained on another base; its checksum differs")
        if checkpoint.facts.get("what") != self._what():
            raise ConfigError(
                f"{path} is of another kind of guide, another stage, or other practice or "
                "negative prompts"
            )
        self._load(checkpoint)
        self.notice(f"resumed from {path} at step {self.step}")

    def _what(self) -> dict[str, Any]:
        """What is trained, in plain JSON: a checkpoint of something else is refused."""
        config = {k: v for k, v in self.guide.config.items() if not k.startswith("_")}
        what = {
            "measure": self.measure, "guide": type(self.guide).__name__, "config": config,
            "practice": self.config.practice, "negative_share": self.config.negative_share,
        }  # fmt: skip
        plain: dict[str, Any] = json.loads(json.dumps(what))
        return plain

    def _load(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        self.step, self.history, self.smooth = checkpoint.step, facts["history"], facts["smooth"]
        self.seconds = facts["seconds"]
        self.learner.load(checkpoint)
        if not self.accelerator.is_main_process:
            own = self._own_folder() / f"checkpoint-{checkpoint.step}"
            checkpoint = load_checkpoint(own)
        for i, replay in enumerate(self.replays):
            replay.load(checkpoint.part(f"replay.{i}"))
