"""The noise path as mathematics: forward process, predictions, one deterministic step.

Every denoiser here works on a path ``z = alpha x + sigma eps`` from clean latents x to noise eps
(Lipman et al., arXiv 2412.06264, section 4). Its prediction is ``a x + b eps``, with

    epsilon         a = 0        b = 1
    v_prediction    a = -sigma   b = alpha      (Salimans & Ho, arXiv 2202.00512)
    flow            a = -1       b = 1          (arXiv 2403.03206)

so latents and prediction are two equations for x and eps, and everything below follows from
them. Pipelines sample with their own diffusers scheduler. These functions serve training and
measurement, where every latent of a batch has a time of its own.

Time is normalised: the timestep or sigma of diffusers as a number in [0, 1], 1 being noise. A
time below 0 is past the last step of a schedule that does not end at a clean image.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from pilotfish.guidance import per_sample

PredictionType = Literal["epsilon", "v_prediction", "flow"]
PREDICTION_TYPES = get_args(PredictionType)


def prediction_type(scheduler: Any) -> str:
    """The type of prediction that a scheduler expects of the denoiser."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow"
    # schedulers without this field predict epsilon
    stated = scheduler.config.get("prediction_type", "epsilon")
    return "flow" if stated == "flow_prediction" else str(stated)


def deterministic_scheduler(scheduler: Any, even: bool = False) -> Any:
    """A scheduler of the same noise path that takes the steps of this module: DDIM on an even
    grid that ends at the clean image ("trailing"), or Euler for flow matching.

    Args:
        even: whether Euler's times are those of :meth:`NoisePath.grid` where a call gives none.
            It holds for this scheduler alone; saved and loaded again it has diffusers' own times.
    """
    if prediction_type(scheduler) == "flow":
        config = scheduler.config
        shift = config.get("shift", config.get("flow_shift") or 1.0)  # solvers have another name
        changed = {f"use_{name}_sigmas": False for name in ("beta", "exponential", "karras")}
        euler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=shift, **changed)
        if even:
            # no class of its own: a pipeline that is saved names one that diffusers can load
            euler.set_timesteps = partial(_set_even_timesteps, euler)
        return euler
    # DDIM clips by default, which is meant for pixels
    given = {"clip_sample": False, **scheduler.config}
    return DDIMScheduler.from_config(given, timestep_spacing="trailing")


def _set_even_timesteps(
    scheduler: Any, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None,
    mu: float | None = None, timesteps: Any = None,
) -> None:  # fmt: skip
    """``set_timesteps`` of diffusers, but on the even grid where no times are given."""
    if num_inference_steps and sigmas is None and timesteps is None:
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
    type(scheduler).set_timesteps(scheduler, num_inference_steps, device, sigmas, mu, timesteps)


@dataclass(frozen=True)
class NoisePath:
    """A noise path and what the denoiser predicts on it.

    Attributes:
        prediction_type: ``epsilon``, ``v_prediction`` or ``flow``.
        alphas_cumprod: (T,) ``alpha^2 = 1 - sigma^2`` at the times 0, 1/T, ..., of a variance
            preserving path; None for rectified flow, ``alpha = 1 - time``, ``sigma = time``.
        final_alpha_cumprod: the same after the last step, 1 for a clean image.
        scheduler: gives the grids; see :func:`deterministic_scheduler`.
        mu: gives the shift of a grid of so many steps to a scheduler with dynamic shifting.
        shift: s of rectified flow whose time is that before the shift of the noise levels,
            ``sigma = s time / (1 + (s - 1) time)``, in whole timesteps. None where the time is
            sigma.
    """

    prediction_type: str
    alphas_cumprod: torch.Tensor | None = None
    final_alpha_cumprod: float = 1.0
    scheduler: Any = field(default=None, compare=False)
    mu: Callable[[int], float] | None = field(default=None, compare=False)
    shift: float | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction type {self.prediction_type!r} is not one of {PREDICTION_TYPES}"
            )

    @classmethod
    def of(
        cls, scheduler: Any, mu: Callable[[int], float] | None = None, shift: float | None = None
    ) -> NoisePath:  # fmt: skip
        """The path of a diffusers scheduler.

        Args:
            mu: see the class.
            shift: see the class.

        Raises:
            ValueError: the scheduler belongs to neither kind, or predicts something else; or it has
                dynamic shifting and there is neither ``mu`` nor ``shift``.
        """
        prediction = prediction_type(scheduler)
        if prediction == "flow":
            if scheduler.config.get("use_dynamic_shifting") and mu is None and shift is None:
                raise ValueError(
                    "the scheduler shifts its times by the size of images (use_dynamic_shifting), "
                    "by a rule that is not known for this model; give the pipeline a scheduler "
                    "with a fixed shift"
                )
            return cls("flow", scheduler=deterministic_scheduler(scheduler), mu=mu, shift=shift)
        if getattr(scheduler, "alphas_cumprod", None) is None:
            raise ValueError(
                f"{type(scheduler).__name__} has no alphas_cumprod and is no flow matching "
                "scheduler; use one of the DDPM family or FlowMatchEulerDiscreteScheduler"
            )
        ddim = deterministic_scheduler(scheduler)
        return cls(prediction, ddim.alphas_cumprod.float(), float(ddim.final_alpha_cumprod), ddim)

    @property
    def num_train_timesteps(self) -> int:
        """T, the timesteps of the whole path."""
        return int(self.scheduler.config.num_train_timesteps)

    def alpha_sigma(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) times -> (N,) alpha and sigma."""
        if self.alphas_cumprod is None:
            shift = 1.0 if self.shift is None else self.shift
            sigma = shift * time / (1 + (shift - 1) * time)
            return 1 - sigma, sigma
        table = self.alphas_cumprod.to(time.device)
        last = len(table) - 1
        index = (time * len(table)).round().long()
        product = torch.where(index >= 0, table[index.clamp(0, last)], self.final_alpha_cumprod)
        return product.sqrt(), (1 - product).sqrt()

    def _coefficients(self, time: torch.Tensor, like: torch.Tensor) -> tuple[Any, Any, Any, Any]:
        """alpha, sigma, a, b of the module's equations, shaped to multiply ``like``."""
        alpha, sigma = (per_sample(x, like) for x in self.alpha_sigma(time))
        if self.prediction_type == "epsilon":
            return alpha, sigma, 0.0, 1.0
        if self.prediction_type == "v_prediction":
            return alpha, sigma, -sigma, alpha
        return alpha, sigma, -1.0, 1.0

    def _determinant(self, alpha: Any) -> Any:
        """``alpha b - sigma a``: 1 but for epsilon (``alpha^2 + sigma^2 = 1`` for v,
        ``alpha + sigma = 1`` for flow)."""
        return alpha if self.prediction_type == "epsilon" else 1.0

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Z of clean latents x (N, ...) at times (N,)."""
        alpha, sigma, _, _ = self._coefficients(time, x)
        noisy: torch.Tensor = alpha * x + sigma * noise
        return noisy

    def split(
        self, z: torch.Tensor, prediction: torch.Tensor, time: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and noise ``(x, eps)`` that a prediction at z stands for."""
        alpha, sigma, a, b = self._coefficients(time, z)
        determinant = self._determinant(alpha)
        x = (b * z - sigma * prediction) / determinant
        return x, (alpha * prediction - a * z) / determinant

    def step(
        self, z: torch.Tensor, prediction: torch.Tensor, time: torch.Tensor, to: torch.Tensor
    ) -> torch.Tensor:
        """One deterministic step from ``time`` (N,) to ``to`` (N,): x and eps stay, their
        weights change. It is DDIM with eta = 0 (equation (12) of arXiv 2010.02502) where
        ``alpha^2 + sigma^2 = 1``, and an Euler step for flow matching."""
        x, eps = self.split(z, prediction, time)
        alpha, sigma, _, _ = self._coefficients(to, z)
        stepped: torch.Tensor = alpha * x + sigma * eps
        return stepped

    def prediction_between(
        self, z: torch.Tensor, goal: torch.Tensor, time: torch.Tensor, to: torch.Tensor
    ) -> torch.Tensor:
        """The prediction with which one step from ``time`` to ``to`` lands on ``goal``:
        :meth:`step`, which is linear in the prediction, solved for it. The target of progressive
        distillation, appendix G of arXiv 2202.00512, where ``goal`` is two steps of the teacher
        away."""
        alpha, sigma, a, b = self._coefficients(time, z)
        alpha_to, sigma_to, _, _ = self._coefficients(to, z)
        rest = self._determinant(alpha) * goal - (alpha_to * b - sigma_to * a) * z
        solved: torch.Tensor = rest / (sigma_to * alpha - alpha_to * sigma)
        return solved

    def grid(self, steps: int) -> torch.Tensor:
        """(steps + 1,) times of a sampling of so many steps, from noise down; step i goes from
        ``grid[i]`` to ``grid[i + 1]``. The grid of n steps is every second time of that of 2 n,
        up to the rounding to whole timesteps.

        Raises:
            ValueError: not 1 <= steps <= num_train_timesteps.
        """
        if not 1 <= steps <= self.num_train_timesteps:
            raise ValueError(f"steps must lie in [1, {self.num_train_timesteps}], not {steps}")
        if self.shift is not None:
            whole = (self.num_train_timesteps * torch.linspace(1, 1 / steps, steps)).round()
            return torch.cat([whole / self.num_train_timesteps, torch.zeros(1)])
        scheduler = deepcopy(self.scheduler)
        if self.alphas_cumprod is None:
            if steps == 1 and scheduler.config.get("shift_terminal"):
                return torch.tensor([1.0, 0.0])  # the scheduler would divide zero by zero
            # the scheduler's own grid applies the shift twice and is not nested
            scheduler.set_timesteps(
                sigmas=torch.linspace(1, 1 / steps, steps).tolist(),
                mu=self.mu(steps) if self.mu else None,
            )
            return scheduler.sigmas.float().clone()
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[:steps]  # diffusers may append a -1 by rounding
        grid = torch.cat([timesteps.float(), torch.tensor([-1.0])])
        return grid / self.num_train_timesteps
