"""What a guide is trained to minimise."""

from __future__ import annotations

import torch


def relative_guidance_loss(
    guided: torch.Tensor, target: torch.Tensor, guidance_scale: torch.Tensor
) -> torch.Tensor:
    """Equation (2), ``||guided - cfg||^2``, divided by ``(w - 1)^2``.

    The distance between cfg and the conditional prediction grows with w - 1; dividing by it
    makes every scale count alike, as it does in the guidance error that is measured.

    Returns:
        The mean over batch and elements, a scalar.
    """
    weight = (guidance_scale - 1).clamp(min=0.5) ** -2
    return (weight * (guided.float() - target).pow(2).mean((1, 2, 3))).mean()


def step_loss(
    prediction: torch.Tensor,
    goal: torch.Tensor,
    guidance_scale: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """The squared distance to the prediction that leads where two of the teacher's steps lead.

    Args:
        weight: (N,) that make it the distance of velocities, which is the weighting ``SNR + 1``
            of arXiv 2202.00512, section 4: 1 for v prediction, ``1 / a_t`` for epsilon.

    What the steps leave to learn grows with w, so it is divided by w.

    Returns:
        The mean over batch and elements, a scalar.
    """
    distance = (prediction.float() - goal).pow(2).mean((1, 2, 3))
    return (weight * distance / guidance_scale).mean()
