"""The noise schedule as mathematics: forward process, DDIM step, sampling timesteps.

Pipelines sample with their own diffusers scheduler. These functions serve training,
where every latent of a batch stands at a timestep of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pilotfish.guidance import per_sample

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class NoisePath:
    """A variance-preserving noise schedule ``z_t = sqrt(a_t) x + sqrt(1 - a_t) eps``.

    Attributes:
        alphas_cumprod: (T,) the products a_t, falling from about 1 to about 0.
        prediction_type: ``epsilon`` or ``v_prediction`` (``v = sqrt(a) eps - sqrt(1 - a) x``).
        final_alpha_cumprod: the product after the last step, 1 for a clean picture.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str
    final_alpha_cumprod: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction type {self.prediction_type!r} is not one of {PREDICTION_TYPES}"
            )

    @classmethod
    def of(cls, scheduler: Any) -> NoisePath:
        """The schedule of a diffusers scheduler (anything with ``alphas_cumprod``).

        Raises:
            ValueError: the scheduler has none, or predicts neither epsilon nor v.
        """
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise ValueError(f"{type(scheduler).__name__} has no alphas_cumprod; use a DDPM family")
        final = getattr(scheduler, "final_alpha_cumprod", 1.0)
        return cls(alphas.float(), scheduler.config.prediction_type, float(final))

    def alpha(self, timestep: torch.Tensor) -> torch.Tensor:
        """(N,) timesteps -> (N,) products a_t; a negative timestep is past the last step."""
        inside = self.alphas_cumprod.to(timestep.device)[timestep.clamp(min=0)]
        return torch.where(timestep >= 0, inside, self.final_alpha_cumprod)

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """``z_t`` of clean latents x (N, ...) at timesteps t (N,)."""
        a = per_sample(self.alpha(t), x)
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def split(
        self, z: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a prediction at ``z_t`` says of clean latents and noise: ``(x, eps)``."""
        a = per_sample(self.alpha(t), z)
        if self.prediction_type == "epsilon":
            return (z - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        x = a.sqrt() * z - (1 - a).sqrt() * prediction
        return x, a.sqrt() * prediction + (1 - a).sqrt() * z

    def ddim_step(
        self, z: torch.Tensor, prediction: torch.Tensor, t: torch.Tensor, to: torch.Tensor
    ) -> torch.Tensor:
        """One deterministic DDIM step from t (N,) to ``to`` (N,), equation (12) of
        arXiv 2010.02502 with eta = 0. A negative ``to`` ends the trajectory."""
        x, eps = self.split(z, prediction, t)
        a = per_sample(self.alpha(to), z)
        return a.sqrt() * x + (1 - a).sqrt() * eps

    def prediction_between(
        self, z: torch.Tensor, goal: torch.Tensor, t: torch.Tensor, to: torch.Tensor
    ) -> torch.Tensor:
        """The prediction with which one DDIM step from t (N,) to ``to`` (N,) lands on ``goal``:
        :meth:`ddim_step` solved for it. The target of progressive distillation, appendix G of
        arXiv 2202.00512, where ``goal`` is two steps of the teacher away."""
        a, b = per_sample(self.alpha(t), z), per_sample(self.alpha(to), z)
        if self.prediction_type == "epsilon":
            return (goal - (b / a).sqrt() * z) / ((1 - b).sqrt() - (b * (1 - a) / a).sqrt())
        along = (a * b).sqrt() + ((1 - a) * (1 - b)).sqrt()
        across = (a * (1 - b)).sqrt() - (b * (1 - a)).sqrt()
        return (goal - along * z) / across


def sampling_timesteps(steps: int, train_timesteps: int = 1000) -> torch.Tensor:
    """(steps + 1,) timesteps from the last down, evenly spaced ("trailing" in diffusers),
    closed by -1: ``t[i] -> t[i + 1]`` is step i.

    Raises:
        ValueError: not 1 <= steps <= train_timesteps.
    """
    if not 1 <= steps <= train_timesteps:
        raise ValueError(f"steps must lie in [1, {train_timesteps}], not {steps}")
    # In numpy's double precision, as diffusers does it: where a timestep falls on a half, a
    # coarser grid would round to its neighbour.
    grid = np.arange(train_timesteps, 0, -train_timesteps / steps)[:steps].round().astype(np.int64)
    return torch.from_numpy(np.append(grid - 1, -1))
