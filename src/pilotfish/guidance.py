"""Classifier-free guidance as mathematics: equation (1), the scale w and its embedding.

The convention is diffusers': w = 1 is no guidance. Papers that write
``(1 + w) c - w n`` count one less.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch


class GuidanceMode(StrEnum):
    """The three guidance modes that are compared everywhere."""

    NONE = "none"
    """One pass, the prompt alone."""
    CFG = "cfg"
    """Classifier-free guidance, two passes."""
    GUIDED = "guided"
    """One pass with a guide."""


def classifier_free_guidance(
    unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: torch.Tensor | float
) -> torch.Tensor:
    """``eps_n + w (eps_c - eps_n)``, equation (1) of *Plug-and-Play Diffusion Distillation*
    (arXiv 2406.01954), after Ho & Salimans (arXiv 2207.12598).

    It is linear in the two predictions, so it holds for epsilon, v and flow alike.

    Args:
        unconditional: (N, C, H, W), the prediction for the null or negative prompt.
        conditional: (N, C, H, W), the prediction for the prompt.
        guidance_scale: w, a number or (N,), one for each sample.

    Returns:
        (N, C, H, W)
    """
    # a number multiplies as it does in pipelines: as a tensor it would be rounded to half precision
    single = not isinstance(guidance_scale, torch.Tensor)
    w = guidance_scale if single else per_sample(guidance_scale, conditional)
    return unconditional + w * (conditional - unconditional)


def renormalised_guidance(
    unconditional: torch.Tensor,
    conditional: torch.Tensor,
    guidance_scale: torch.Tensor | float,
    dim: int = -1,
) -> torch.Tensor:
    """Equation (1) brought back to the norm of the conditional prediction along ``dim``, as
    Qwen-Image (along the channels of a token) and Lumina2 do it.

    Args and returns as :func:`classifier_free_guidance`.
    """
    guided = classifier_free_guidance(unconditional, conditional, guidance_scale)
    norm, target = (x.norm(dim=dim, keepdim=True) for x in (guided, conditional))
    return guided * (target / norm)


def rescaled_guidance(
    unconditional: torch.Tensor,
    conditional: torch.Tensor,
    guidance_scale: torch.Tensor | float,
    rescale: float,
) -> torch.Tensor:
    """Equation (1) mixed with itself at the standard deviation of the conditional prediction:
    section 3.4 of *Common Diffusion Noise Schedules and Sample Steps are Flawed*
    (arXiv 2305.08891), diffusers' ``guidance_rescale``.

    Args:
        rescale: share of the rescaled prediction, in [0, 1]. Others and returns as
            :func:`classifier_free_guidance`.
    """
    guided = classifier_free_guidance(unconditional, conditional, guidance_scale)
    dims = tuple(range(1, guided.ndim))
    scaled = guided * conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
    return rescale * scaled + (1 - rescale) * guided


def projected_unconditional(
    unconditional: torch.Tensor, conditional: torch.Tensor, eta: float, norm_threshold: float = 0.0
) -> torch.Tensor:
    """``eps_c - p(eps_c - eps_n)``, with which equation (1) is adaptive projected guidance without
    momentum: algorithm 1 of arXiv 2410.02416, by diffusers' ``normalized_guidance``. p shortens the
    difference to a norm and turns down its part along the conditional prediction, which saturates.

    Args:
        eta: share of that part that is kept, in [0, 1].
        norm_threshold: largest norm; 0 for none. Others and returns as
            :func:`classifier_free_guidance`; with ``eta = 1`` and no norm it is ``eps_n``.
    """
    if eta == 1 and not norm_threshold:
        return unconditional
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    made: torch.Tensor = normalized_guidance(
        conditional, unconditional, -1.0, eta=eta, norm_threshold=norm_threshold,
        use_original_formulation=True,
    )  # fmt: skip
    return made


def scaled_unconditional(unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
    """``s eps_n``, with the s of each sample that brings it nearest to the conditional prediction:
    section 4.1 of *CFG-Zero** (arXiv 2503.18886), by diffusers' ``cfg_zero_star_scale``.

    Args and returns as :func:`classifier_free_guidance`.
    """
    from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale

    scale = cfg_zero_star_scale(conditional.flatten(1), unconditional.flatten(1))
    return unconditional * per_sample(scale.flatten(), unconditional)


def per_sample(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A number or (N,) as a tensor that multiplies ``like`` (N, ...) sample by sample."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def draw_guidance_scales(
    n: int, low: float, high: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """(n,) guidance scales, uniform on [low, high]; fractions count.

    Raises:
        ValueError: not 1 <= low <= high.
    """
    if not 1 <= low <= high:
        raise ValueError(f"guidance scales are drawn from 1 <= low <= high, not [{low}, {high}]")
    return low + (high - low) * torch.rand(n, generator=generator)


def fourier_features(x: torch.Tensor, size: int, longest: float) -> torch.Tensor:
    """(...) -> (..., size): cosines and sines of ``2 pi x / period``, with periods spaced
    geometrically from ``longest`` down to ``longest / 2**(size / 4)``.

    The embedding of w in *On Distillation of Guided Diffusion Models* (arXiv 2210.03142);
    neighbouring values stay distinguishable and none is rounded.
    """
    half = size // 2
    frequency = 2 ** torch.linspace(0, size / 4, half, device=x.device, dtype=torch.float32)
    angle = 2 * math.pi * x.float()[..., None] * frequency / longest
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def guidance_strength(guidance_scale: torch.Tensor) -> torch.Tensor:
    """How far a scale is from no guidance: ``w - 1``, and 0 below 1 (there CFG is off)."""
    return (guidance_scale - 1).clamp(min=0)
