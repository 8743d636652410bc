"""Stage 2: a guide learns to take one step where its teacher takes two.

Progressive distillation (Salimans & Ho, arXiv 2202.00512) of the guided one-pass model. The
base stays frozen and w stays an input; only the guide learns. The number of steps halves from
round to round, and each round's student is the next one's teacher; or CFG itself is the teacher
of every round, and each round's student is what the next one begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch

from pilotfish.backbones import fingerprint
from pilotfish.guidance import classifier_free_guidance
from pilotfish.guides import Guide
from pilotfish.noise import sampling_timesteps
from pilotfish.pipelines.loading import take_ddim_steps
from pilotfish.training.config import ConfigError, StepsConfig
from pilotfish.training.loop import Distillation
from pilotfish.training.loss import step_loss
from pilotfish.training.material import Material
from pilotfish.training.states import Source, States
from pilotfish.training.step_states import HalvedTrajectories
from pilotfish.training.validation import StepValidation


class StepDistillation(Distillation):
    """One round of stage 2. See :class:`Distillation`.

    Args:
        teacher: the guide that the student begins as a copy of. It is the teacher, and takes
            ``2 * steps`` steps, unless ``config.teacher`` is CFG.
        steps: the student's.

    Raises:
        ConfigError: the teacher was distilled to another number of steps.
        GuideError: the teacher does not fit the base.
    """

    config: StepsConfig
    measure = "step_error"
    decisive = (*Distillation.decisive, "teacher", "overdrive")
    rate_factor = 0.2  # the guide has learnt the most by now

    def __init__(
        self, config: StepsConfig, material: Material, teacher: Guide, steps: int,
        notice: Callable[[str], None] = print,
    ) -> None:  # fmt: skip
        pipe, total = material.pipe, len(material.schedule.alphas_cumprod)
        teacher.check(fingerprint(pipe.unet, material.schedule.prediction_type))
        by_guide = config.teacher == "guide"
        if by_guide and teacher.timesteps not in (None, timesteps(2 * steps, total)):
            raise ConfigError(
                f"the guide takes {len(teacher.timesteps or ())} steps; a student of {steps} "
                f"needs a teacher of {2 * steps}, or one that was not distilled to few steps"
            )
        take_ddim_steps(pipe)
        self.steps = steps
        student = deepcopy(teacher).requires_grad_(True)
        student.register_to_config(
            timesteps=list(timesteps(steps, total)),
            guidance_scale_range=(config.guidance_scale_min, config.guidance_scale_max),
        )
        super().__init__(config, material, student, notice)
        self.leader = teacher.eval().requires_grad_(False) if by_guide else None
        if self.leader is not None:
            self.leading = material.student(self.leader.to(self.accelerator.device))
            self.hooks.append(self.leading.hooks)

    def source(self, stream: int, host: int) -> Source:
        """Latents on the student's grid, some of them led by the student itself."""
        pool = self.pool(stream, host, (self.steps, self.steps), self.config.student_share)
        return HalvedTrajectories(self.teach, self.material.schedule, pool, self.own_prediction)

    @torch.no_grad()
    def teach(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor, w: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """What the teacher predicts: CFG in two passes, overdriven where that is asked for, or
        the guide that it is in one."""
        if self.leader is None:
            said = self.teacher(latents, timestep, prompt, negative)
            return classifier_free_guidance(*said, 1 + self.config.overdrive * (w - 1))
        made: torch.Tensor = self.leading(latents, timestep, *self.texts(prompt, negative), w)
        return made.float()

    def loss(
        self, guided: torch.Tensor, target: torch.Tensor, guidance_scale: torch.Tensor,
        states: States,
    ) -> torch.Tensor:  # fmt: skip
        """See :func:`step_loss`."""
        schedule = self.material.schedule
        if schedule.prediction_type == "epsilon":  # |v|^2 = |eps|^2 / a
            weight = 1 / schedule.alpha(states.timestep)
        else:
            weight = torch.ones_like(guidance_scale)
        return step_loss(guided, target, guidance_scale, weight)

    def validation(self) -> StepValidation:
        """The distance of final latents to the teacher's."""
        # a copy: in pictures it takes on the precision of the base
        return StepValidation(self.config, self.material, deepcopy(self.leader), self.steps)


def timesteps(steps: int, total: int) -> tuple[int, ...]:
    """Those at which a guide of so many steps is asked."""
    return tuple(sampling_timesteps(steps, total)[:-1].tolist())
