"""The paper's tiny guide: a small network of its own that runs beside the base.

It answers with a correction to each skip feature and to the mid block. ``reads`` chooses
what enters. ``("latents",)`` is the plain form that the paper describes: z_t, t, w and the
text, and nothing of the base. With ``skips`` it reads what the base's encoder computed, which
is free, as the single pass runs the encoder anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.backbones import skip_channels, skip_levels
from pilotfish.guidance import guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import Condition, silent
from pilotfish.interface import GuideError, GuideInputs, GuideOutput

READS = ("latents", "skips")


class ExternalGuide(Guide):
    """See the module.

    Args:
        denoiser: the fingerprint of the denoiser.
        reads: what enters beside t, w and text: ``latents``, ``skips`` or both.
        rank: channels inside the guide.
        condition: width of the embedding of t, w and text.
        rounds: how often the levels mix.
        guidance_scale_range: the (low, high) of w in training.
        timesteps: of a guide distilled to few steps, the only ones that it knows.
        trained_on: name and revision of the base, where they are known.

    Raises:
        GuideError: ``reads`` is empty or names something else.
    """

    learning_rate = 3e-3

    @register_to_config
    def __init__(
        self,
        denoiser: dict[str, Any],
        reads: Sequence[str] = ("latents",),
        rank: int = 40,
        condition: int = 32,
        rounds: int = 1,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        timesteps: Sequence[int] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.1.0",
    ) -> None:
        super().__init__()
        if not reads or set(reads) - set(READS):
            raise GuideError(f"an external guide reads one or both of {READS}, not {tuple(reads)}")
        channels = skip_channels(denoiser)
        # the mid block stands at the last level, after the skips
        self.levels = [*skip_levels(denoiser), len(denoiser["block_out_channels"]) - 1]
        self.sizes = [*channels, channels[-1]]
        self.depth = self.levels[-1] + 1
        widths = [
            sum(c for c, l in zip(self.sizes, self.levels, strict=True) if l == level)
            for level in range(self.depth)
        ]
        entering = [
            (width if "skips" in reads else 0)
            + (denoiser["in_channels"] if "latents" in reads else 0)
            for width in widths
        ]
        self.embedding = Condition(denoiser["cross_attention_dim"], condition)
        self.inputs = nn.ModuleList([nn.Conv2d(c, rank, 1) for c in entering])
        self.mixers = nn.ModuleList([Mixer(rank, condition) for _ in range(rounds * self.depth)])
        self.outputs = nn.ModuleList([silent(nn.Conv2d(rank, c, 1)) for c in widths])

    def forward(self, inputs: GuideInputs) -> GuideOutput:
        return GuideOutput(encoder=partial(self._answer, inputs))

    def _answer(
        self, inputs: GuideInputs, skips: tuple[torch.Tensor, ...], mid: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        z, w = inputs.latents, inputs.guidance_scale
        condition = self.embedding(inputs)
        entering = self._entering(z, [*skips, mid])
        hidden = [conv(x) for conv, x in zip(self.inputs, entering, strict=True)]
        for i in range(0, len(self.mixers), self.depth):
            for level in range(1, self.depth):  # fine to coarse
                small = _shrink(hidden[level - 1], hidden[level])
                hidden[level] = hidden[level] + small
            for level in reversed(range(self.depth)):  # coarse to fine
                if level + 1 < self.depth:
                    large = F.interpolate(hidden[level + 1], size=hidden[level].shape[-2:])
                    hidden[level] = hidden[level] + large
                hidden[level] = self.mixers[i + level](hidden[level], condition)
        strength = per_sample(torch.log1p(guidance_strength(w)), z)
        out: list[torch.Tensor] = []
        for level, conv in enumerate(self.outputs):
            sizes = [c for c, l in zip(self.sizes, self.levels, strict=True) if l == level]
            out += (strength * conv(hidden[level])).split(sizes, dim=1)
        return tuple(out[:-1]), out[-1]

    def _entering(self, latents: torch.Tensor, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """What is read at each level, normalised and side by side."""
        entering = []
        for level in range(self.depth):
            here = [f for f, l in zip(features, self.levels, strict=True) if l == level]
            parts = [F.group_norm(f, 1) for f in here] if "skips" in self.config.reads else []
            if "latents" in self.config.reads:
                parts.append(_shrink(latents, here[0]))
            entering.append(torch.cat(parts, 1))
        return entering


def _shrink(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``x`` averaged down to the height and width of ``like``."""
    height, width = like.shape[-2:]
    return F.adaptive_avg_pool2d(x, (height, width))


class Mixer(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution, modulated by the condition; a residual."""

    def __init__(self, rank: int, condition: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(condition, 2 * rank)
        self.spread = nn.Conv2d(rank, rank, 3, padding=1, groups=rank)
        self.mix = nn.Conv2d(rank, rank, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(N, rank, h, w) and (N, condition) -> (N, rank, h, w)."""
        gain, shift = self.modulate(condition)[:, :, None, None].chunk(2, 1)
        hidden: torch.Tensor = F.group_norm(self.spread(x), 1) * (1 + gain) + shift
        return x + self.mix(F.silu(hidden))
