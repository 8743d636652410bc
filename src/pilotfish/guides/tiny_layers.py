"""What a tiny guide is built from: a modulated convolution of low rank and what it adds, the age of
a refresh, templates of a negative prompt."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.guidance import fourier_features
from pilotfish.guides.layers import FEATURES, zero_module
from pilotfish.interface import Refresh

COMPARED = 5
"""Numbers by which what a refresh found is described, in addition to its age."""
SHORTEST = 1e-2
"""Times between two refreshes that are shorter are not told apart."""
SIDE = 8
"""Pixels of an unconditional template, each way; it is resized to the latents."""


class Path(NamedTuple):
    """A :class:`LowRank` modulated: the first matrix times the gain (..., N, rank, entering), the
    shift (..., N, rank, 1), the last matrix times the strength (..., N, leaving, rank)."""

    down: torch.Tensor
    shift: torch.Tensor
    up: torch.Tensor


class LowRank(nn.Module):
    """``up silu(h + near h)`` with ``h = gain * down x + shift``, of ``rank`` channels.

    ``down`` and ``up`` are 1x1 convolutions, written as matrix products: on few pixels the call
    of a convolution costs more than its arithmetic. ``near`` is a 3x3 convolution of each channel
    by itself: the details that guidance sharpens are differences between neighbours.
    """

    def __init__(self, entering: int, leaving: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, entering))
        self.up = nn.Parameter(torch.zeros(leaving, rank))
        self.near = nn.Conv2d(rank, rank, 3, padding=1, groups=rank, bias=False)
        nn.init.uniform_(self.down, -(entering**-0.5), entering**-0.5)
        nn.init.zeros_(self.near.weight)

    def kernel(self) -> torch.Tensor:
        """(rank, 1, 3, 3) ``h + near h`` as one convolution."""
        identity = F.pad(self.near.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        return self.near.weight + identity


def low_rank(x: torch.Tensor, made: torch.Tensor, path: Path, kernel: torch.Tensor) -> torch.Tensor:
    """A modulated :class:`LowRank` of x (N, entering, h, w), added to ``made`` (N, leaving, h, w),
    in as few operators as it has products."""
    n, entering, height, width = x.shape
    down, shift, up = (t if len(t) == n else t.expand(n, -1, -1) for t in path)
    down = down[..., :entering]  # what is last may be left out: it is zero
    # (N, pixels, rank): the layout in which a depthwise convolution is fastest
    hidden = torch.baddbmm(shift.mT, x.flatten(2).mT, down.mT)
    hidden = hidden.mT.unflatten(2, (height, width))
    hidden = F.conv2d(hidden, kernel, padding=1, groups=len(kernel))
    # on many pixels a third map of this size would be the peak of a step's memory
    hidden = F.silu(hidden, inplace=not torch.is_grad_enabled())
    return torch.baddbmm(made.flatten(2), up, hidden.flatten(2)).view_as(made)


def add_to_layer(
    path: Path, kernel: torch.Tensor, entered: torch.Tensor, made: torch.Tensor
) -> torch.Tensor:
    """The output of a decoder layer, (N, channels, h, w), with a function of itself added."""
    return low_rank(F.group_norm(made, 1), made, path, kernel)


def add_to_prediction(
    path: Path, kernel: torch.Tensor, scalings: tuple[torch.Tensor, ...],
    template: torch.Tensor | None, latents: torch.Tensor, found: tuple[torch.Tensor, ...],
    features: torch.Tensor, prediction: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The prediction (N, C, h, w) with the head's output added.

    The head reads the last features, the prediction and the latents, and after a refresh the
    difference, the conditional prediction and the latents found there, and the change of the
    difference since. The features come out of the denoiser's last normalisation and need none
    here. Beside that path the head scales all but the features channel by channel: at high
    noise the unconditional prediction is close to a constant, and CFG little more than that
    scaling; with a negative prompt it is close to the image that that prompt leads to, the
    template. After a refresh the present difference is close to such a sum: of the last one, of
    its change, and of what prediction and latents were and are.

    Args:
        scalings: (N, C, 1, 1) of the prediction, of the latents and of what was found.
        template: (N, C, SIDE, SIDE) or None.
        found: (N, C, h, w) each; empty without a refresh.
    """
    scaled = [prediction, latents, *found]
    made = low_rank(torch.cat([features, *scaled], 1), prediction, path, kernel)
    for scaling, of in zip(scalings, scaled, strict=True):
        made = torch.addcmul(made, scaling, of)
    if template is not None:
        made = made + F.interpolate(template, prediction.shape[-2:], mode="bilinear")
    return made


class Age(nn.Module):
    """What a refresh says of itself: its age, its distance to the one before, and how the
    difference that it found and its slope compare with the conditional prediction there.

    Args:
        width: of the embedding of time, w and text, to which this is added.
        scalings: of the head, which depend on time and age more sharply than all else.
    """

    def __init__(self, width: int, scalings: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(3 * FEATURES + COMPARED, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.to_condition = nn.Linear(width, width)
        self.to_scalings = zero_module(nn.Linear(width, scalings))

    def forward(
        self, time: torch.Tensor, guidance_scale: torch.Tensor, refresh: Refresh
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., N, width) and (..., N, scalings) at times (..., N) and scales that broadcast with
        them; 0 where there was no refresh."""
        time, w = torch.broadcast_tensors(time.float(), guidance_scale.float())
        age = (refresh.time.float() - time) / 2
        numbers = torch.stack([time / 4, age, w / 32], -1)
        seen = fourier_features(numbers, FEATURES, longest=1.0).flatten(-2)
        seen = torch.cat([seen, _compared(refresh).expand(*seen.shape[:-1], COMPARED)], -1)
        known = refresh.known.to(refresh.difference.dtype)[:, None]
        hidden = self.embed(seen.to(known.dtype))
        return known * self.to_condition(hidden), known * self.to_scalings(hidden)


def _compared(refresh: Refresh) -> torch.Tensor:
    """(N, COMPARED) logarithms of four numbers: the root mean squares of the difference, of the
    conditional prediction and of the slope, and the gap; then the cosine of the first two."""
    maps = (refresh.difference, refresh.conditional, refresh.slope)
    difference, conditional, slope = (x.flatten(1).float() for x in maps)
    rms = torch.stack([x.square().mean(1) for x in (difference, conditional, slope)], 1)
    rms = rms.clamp(min=1e-8)
    cosine = F.cosine_similarity(difference, conditional, dim=1)
    gap = refresh.gap.float().clamp(min=SHORTEST).log()
    return torch.cat([rms.log() / 2, gap[:, None], cosine[:, None]], 1)


class Templates(nn.Module):
    """Coarse predictions of the base for the negative prompt alone, mixed by that prompt.

    At high noise, where the latents say nothing yet, the unconditional prediction is mostly a
    function of its prompt, and the pass for another prompt holds nothing of it.

    Args:
        width: of the embedding of time, w and text, and of the negative prompt's.
        channels: of the prediction.
        mixed: how many there are.
    """

    def __init__(self, width: int, channels: int, mixed: int) -> None:
        super().__init__()
        self.negative = nn.Linear(width, mixed)
        self.condition = nn.Linear(width, mixed, bias=False)
        self.templates = zero_module(nn.Linear(mixed, channels * SIDE**2))

    def forward(self, negative: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(N, width) and (..., N, width) -> (..., N, channels, SIDE, SIDE)."""
        shares = F.silu(self.negative(negative) + self.condition(condition))
        made: torch.Tensor = self.templates(shares)
        return made.unflatten(-1, (-1, SIDE, SIDE))
