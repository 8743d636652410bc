"""Augmentation: affine views; blur, noise and colour casts for the scorer; and restyling for
fine-tune augmentation. Images are (N, 3, H, W) in [-1, 1] on white, which stays white."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Restyle = Callable[[torch.Tensor], torch.Tensor]


def affine(
    images: torch.Tensor, generator: torch.Generator, shift: float = 0.06, scale: float = 0.1,
    turn: float = 0.0, mirror: float = 0.3,
) -> torch.Tensor:  # fmt: skip
    """Shift by up to ``shift`` of the side, shrink by up to ``scale``, rotate by up to ``turn``
    radians, mirror with probability ``mirror``; the border is filled with white."""
    n = len(images)
    factor = 1 + scale * torch.rand(n, generator=generator)
    angle = turn * (2 * torch.rand(n, generator=generator) - 1)
    flip = 1 - 2 * (torch.rand(n, generator=generator) < mirror).float()
    offset = 2 * shift * (2 * torch.rand(n, 2, generator=generator) - 1)
    cos, sin = factor * torch.cos(angle), factor * torch.sin(angle)
    theta = torch.stack(
        [torch.stack([cos * flip, -sin, offset[:, 0]], 1),
         torch.stack([sin * flip, cos, offset[:, 1]], 1)], 1)  # fmt: skip
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, noise and colour casts, as generated images have them."""
    n = len(images)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, generator=generator)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    kind = rand(1, 1, 1)
    images = torch.where(kind < 0.25, blurred, torch.where(kind < 0.45, coarse, images))
    images = images * (1 + 0.3 * (rand(3, 1, 1) - 0.5)) + 0.2 * (rand(3, 1, 1) - 0.5)
    noise = torch.randn(images.shape, generator=generator)
    return images + 0.15 * rand(1, 1, 1) * noise


def contours(images: torch.Tensor) -> torch.Tensor:
    """Pale colours within dark contours."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs()
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs()
    contour = (across + down).amax(1, keepdim=True).clamp(max=1)
    pale = (images + 1) / 2
    return 2 * ((0.5 + 0.5 * pale) * (1 - contour)) - 1


def flat(images: torch.Tensor) -> torch.Tensor:
    """Few, strong colours without shading."""
    shade = (images + 1) / 2
    smooth = F.avg_pool2d(F.pad(shade, (1, 1, 1, 1), mode="replicate"), 3, 1)
    grey = smooth.mean(1, keepdim=True)
    strong = (grey + 1.5 * (smooth - grey)).clamp(0, 1)
    return 2 * ((3 * strong).round() / 3) - 1


def lit(images: torch.Tensor) -> torch.Tensor:
    """Relief lit from the upper left; the colour channels permuted."""
    body = (images < 0.95).any(1, keepdim=True).float()
    height = body
    for _ in range(3):
        height = F.avg_pool2d(F.pad(height, (3, 3, 3, 3)), 7, 1)
    padded = F.pad(height, (1, 1, 1, 1), mode="replicate")
    slope = padded[..., 2:, 2:] - padded[..., :-2, :-2]
    light = body * (3 * slope).clamp(-0.5, 0.5)
    permuted = (images[:, [1, 2, 0]] + 1) / 2
    return 2 * (permuted + light).clamp(0, 1) * body + 2 * (1 - body) - 1
