"""The tiny guide: about one per cent of the base, reading what the base's encoder computed.

In the single pass the base runs its encoder anyway, so its skip features are free. This
guide reads them through 1x1 convolutions of low rank, lets the levels talk to each
other, modulates by w, timestep and text, and answers with a correction to each of them.

``reads`` chooses what enters. ``("latents",)`` is the plain form that the paper
describes: an external network that sees z_t, t, w and the text, and nothing of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.contract import GuideInputs, Injection
from pilotfish.denoisers import fingerprint, skip_channels, skip_levels
from pilotfish.guidance import fourier_features, guidance_strength, per_sample
from pilotfish.guides.base import Guide

READS = ("latents", "skips")
EMBEDDING = 16


class TinyGuide(Guide):
    """See the module.

    Args:
        denoiser: the fingerprint of the denoiser.
        reads: what enters beside t, w and text: ``latents``, ``skips`` or both.
        rank: channels inside the guide.
        condition: width of the embedding of t, w and text.
        blocks: rounds of mixing.
        guidance_scale_range: the (low, high) of w in training.
    """

    @register_to_config
    def __init__(
        self,
        denoiser: dict[str, Any],
        reads: Sequence[str] = ("latents", "skips"),
        rank: int = 32,
        condition: int = 32,
        blocks: int = 1,
        full_conv: bool = False,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        pilotfish_version: str = "0.1.0",
    ) -> None:
        super().__init__()
        channels = skip_channels(denoiser)
        sizes = [*channels, channels[-1]]
        self.levels = [*skip_levels(denoiser), len(denoiser["block_out_channels"]) - 1]
        depth = self.levels[-1] + 1
        self.embed = nn.Sequential(
            nn.Linear(2 * EMBEDDING, condition), nn.SiLU(), nn.Linear(condition, condition)
        )
        self.text = nn.Linear(denoiser["cross_attention_dim"], condition, bias=False)
        self.latent_inputs = nn.ModuleList(
            [nn.Conv2d(denoiser["in_channels"], rank, 3, padding=1) for _ in range(depth)]
            if "latents" in reads
            else []
        )
        self.inputs = nn.ModuleList(
            [nn.Conv2d(c, rank, 1, bias=False) for c in sizes] if "skips" in reads else []
        )
        self.rounds = nn.ModuleList(
            [nn.ModuleList([Block(rank, condition, full_conv) for _ in range(depth)]) for _ in range(blocks)]
        )
        self.outputs = nn.ModuleList([nn.Conv2d(rank, c, 1) for c in sizes])
        for layer in self.outputs:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def for_denoiser(cls, unet: UNet2DConditionModel, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet."""
        return cls(fingerprint(unet, prediction_type), **config)

    def forward(self, inputs: GuideInputs) -> Injection:
        z = inputs.latents
        scale = inputs.guidance_scale
        seen = torch.cat(
            [fourier_features(inputs.timestep, EMBEDDING, 4000.0),
             fourier_features(scale, EMBEDDING, 32.0)], 1).to(z.dtype)
        text = inputs.encoder_hidden_states.mean(1) - inputs.negative_hidden_states.mean(1)
        condition = F.silu(self.embed(seen) + self.text(text))
        features = [*inputs.skips, inputs.mid]
        shapes = {level: f.shape[-2:] for level, f in zip(self.levels, features, strict=True)}
        hidden: list[torch.Tensor] = []
        for level, shape in sorted(shapes.items()):
            parts = [conv(_norm(f)) for conv, f, l in zip(self.inputs, features, self.levels) if l == level]
            if len(self.latent_inputs):
                parts.append(self.latent_inputs[level](F.adaptive_avg_pool2d(z, shape)))
            hidden.append(sum(parts[1:], parts[0]))
        for blocks in self.rounds:
            for level in range(1, len(hidden)):
                hidden[level] = hidden[level] + F.adaptive_avg_pool2d(hidden[level - 1], hidden[level].shape[-2:])
            for level in range(len(hidden) - 1, -1, -1):
                if level + 1 < len(hidden):
                    hidden[level] = hidden[level] + F.interpolate(hidden[level + 1], size=hidden[level].shape[-2:])
                hidden[level] = blocks[level](hidden[level], condition)
        strength = per_sample(torch.log1p(guidance_strength(scale)), z)
        out = [strength * conv(hidden[l]) for conv, l in zip(self.outputs, self.levels)]
        return Injection(tuple(out[:-1]), out[-1])


class Block(nn.Module):
    def __init__(self, rank: int, condition: int, full: bool) -> None:
        super().__init__()
        self.film = nn.Linear(condition, 2 * rank)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1, groups=1 if full else rank)
        self.mix = nn.Conv2d(rank, rank, 1)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        gain, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
        h = _norm(self.conv(x)) * (1 + gain) + shift
        return x + self.mix(F.silu(h))


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 1)
