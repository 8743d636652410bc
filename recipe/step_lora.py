"""Stage ``step_lora``: a LoRA with which the base draws in 4 steps, as those of Lightning or LCM.

It is distilled from the base's predictions for single texts, without guidance, so that CFG and
guides work on it as on the base. It is no part of what guides are trained or chosen on.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pilotfish import bundled
from pilotfish.noise import NoisePath
from recipe.batches import Batches, DenoiserStage
from recipe.finetunes import LORA_TARGETS
from recipe.loop import train


@dataclass(frozen=True)
class StepLoraStage:
    """How it is trained.

    Attributes:
        student_steps: of a sampling with the LoRA.
        teacher_steps: of the base, in the place of one step of the student.
    """

    steps: int = 600
    batch: int = 64
    student_steps: int = 4
    teacher_steps: int = 4
    learning_rate: float = 1e-3
    rank: int = 24
    seed: int = 0


def make_step_lora(
    images: Path, target: Path, work: Path, stage: StepLoraStage, *, bf16: bool
) -> None:
    """Train it on ``target/base``; save it as ``target/step-lora`` in diffusers' format."""
    torch.manual_seed(stage.seed)
    pipe: Any = DiffusionPipeline.from_pretrained(target / "base")
    pipe.text_encoder.float().requires_grad_(False)
    teacher = pipe.unet.requires_grad_(False).to(memory_format=torch.channels_last)
    student = deepcopy(teacher)
    student.add_adapter(
        LoraConfig(r=stage.rank, lora_alpha=stage.rank, target_modules=LORA_TARGETS["base"])
    )
    average = deepcopy(student)
    settings = replace(
        DenoiserStage(), batch=stage.batch, drop=0.25, views=3, final_begin=0, seed=stage.seed
    )
    batches = Batches(pipe.vae, pipe.tokenizer, images / "noto", settings)
    path = NoisePath.of(pipe.scheduler)
    fine = path.grid(stage.student_steps * stage.teacher_steps)

    def predict(unet: Any, z: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        timesteps = (time * path.num_train_timesteps).round()
        made: torch.Tensor = unet(z, timesteps, text).sample
        return made.float()

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        """Progressive distillation, arXiv 2202.00512, with more than two steps of the teacher."""
        batch = batches(step, generator)
        first = torch.randint(stage.student_steps, batch.time.shape, generator=generator)
        first = first * stage.teacher_steps
        latents = path.add_noise(batch.latents, batch.noise, fine[first])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                text, goal = pipe.text_encoder(batch.tokens)[0], latents
                for i in range(stage.teacher_steps):
                    time = fine[first + i]
                    predicted = predict(teacher, goal, time, text)
                    goal = path.step(goal, predicted, time, fine[first + i + 1])
            made = predict(student, latents, fine[first], text)
        begin, end = fine[first], fine[first + stage.teacher_steps]
        return F.mse_loss(made, path.prediction_between(latents, goal, begin, end))

    train(
        work / bundled.STEP_LORA, {"unet": student}, loss, steps=stage.steps,
        learning_rate=stage.learning_rate, seed=stage.seed, averages={"unet": average},
        decay=0.99,
    )  # fmt: skip
    layers = get_peft_model_state_dict(average.to(memory_format=torch.contiguous_format).half())
    type(pipe).save_lora_weights(target / bundled.STEP_LORA, unet_lora_layers=layers)
