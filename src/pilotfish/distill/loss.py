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
