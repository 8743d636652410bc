"""Stage 1: a guide learns equation (1), so that one pass does what guidance needs two for."""

from __future__ import annotations

import torch

from pilotfish.training.config import DistillConfig
from pilotfish.training.guidance_states import NoisedPictures, RollingTrajectories
from pilotfish.training.loop import Distillation
from pilotfish.training.loss import relative_guidance_loss
from pilotfish.training.states import Source, States
from pilotfish.training.validation import GuidanceValidation


class GuidanceDistillation(Distillation):
    """One run of stage 1. See :class:`Distillation`."""

    config: DistillConfig
    measure = "guidance_error"
    decisive = (*Distillation.decisive, "begin_with", "states")

    def source(self, stream: int, host: int) -> Source:
        """The states that ``--states`` names."""
        config, material = self.config, self.material
        if config.states == "noised":
            latents, prompt = material.pictures
            scales = (config.guidance_scale_min, config.guidance_scale_max)
            return NoisedPictures(
                self.teacher, material.schedule, latents, prompt, scales,
                len(material.prompts), config.negative_share,
            )  # fmt: skip
        own = config.states == "student"
        pool = self.pool(
            stream,
            host,
            (config.trajectory_steps_min, config.trajectory_steps_max),
            config.student_share if own else 0.0,
        )
        student = self.own_prediction if own else None
        return RollingTrajectories(self.teacher, material.schedule, pool, student)

    def loss(
        self, guided: torch.Tensor, target: torch.Tensor, guidance_scale: torch.Tensor,
        states: States,
    ) -> torch.Tensor:  # fmt: skip
        """Equation (2), every scale counting alike."""
        return relative_guidance_loss(guided, target, guidance_scale)

    def validation(self) -> GuidanceValidation:
        """The guidance error on held-out prompts."""
        return GuidanceValidation(self.config, self.material, self.teacher)
