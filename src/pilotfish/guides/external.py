"""The paper's tiny guide: a small separate network. UNets only.

It adds to each skip feature and to the mid block's output, and reads the latents, time, w and the
text, and nothing of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.guidance import guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import Condition, zero_module
from pilotfish.interface import GuideError, GuideInputs, GuideOutput


@dataclass(frozen=True)
class ExternalSettings:
    """What can be chosen of an external guide."""

    rank: int = 40
    """Channels inside the guide."""
    condition_dim: int = 32
    """Width of the embedding of time, w and text."""
    normalize_text: bool = True
    """Whether what it reads of the text's embeddings is divided by their root mean square, which
    differs between text encoders."""
    rounds: int = 1
    """How often the levels mix."""


class ExternalGuide(Guide, guide_type="external", settings=ExternalSettings):
    """See the module.

    Args:
        signature: of the denoiser, a UNet.
        guidance_scale_range: the (low, high) of w in training.
        times: of a guide distilled to few steps, those that it was trained at.
        refresh_ratio: see :attr:`Guide.refresh_ratio`.
        trained_on: name and revision of the base, where they are known.
        teacher: see :class:`Guide`.

    The others are those of :class:`ExternalSettings`.

    Raises:
        GuideError: the denoiser has no skip features.
    """

    learning_rate = 3e-3

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        rank: int = 40,
        condition_dim: int = 32,
        normalize_text: bool = False,
        rounds: int = 1,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        refresh_ratio: float = 0.0,
        trained_on: dict[str, str] | None = None,
        teacher: dict[str, Any] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
        super().__init__()
        if "encoder" not in signature:
            raise GuideError(
                f"the external guide adds to a UNet's skip features, and {signature['family']} has "
                "none; use the tiny guide"
            )
        # [channels, level] of each feature; the mid block stands at the last level, after the skips
        skips = signature["encoder"]
        self.features = [*skips, [signature["middle"], skips[-1][1]]]
        self.depth = skips[-1][1] + 1
        widths = [sum(c for c, l in self.features if l == level) for level in range(self.depth)]
        channels = signature["head"]["channels"]
        self.condition = Condition(signature["text_dim"], condition_dim, normalize=normalize_text)
        self.inputs = nn.ModuleList([nn.Conv2d(channels, rank, 1) for _ in widths])
        self.mixers = nn.ModuleList(
            [Mixer(rank, condition_dim) for _ in range(rounds * len(widths))]
        )
        self.outputs = nn.ModuleList([zero_module(nn.Conv2d(rank, c, 1)) for c in widths])

    @classmethod
    def for_denoiser(
        cls, denoiser: Any, prediction_type: str, *,
        normalize_text: bool = ExternalSettings.normalize_text, **config: Any,
    ) -> Self:  # fmt: skip
        return super().for_denoiser(
            denoiser, prediction_type, normalize_text=normalize_text, **config
        )  # fmt: skip

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        z, w = inputs.latents, inputs.guidance_scale
        condition = self.condition(inputs.time, w, inputs.text, inputs.negative)
        levels = [z]
        for _ in range(1, self.depth):  # each of half the resolution, rounded up as the base's are
            height, width = (-(-side // 2) for side in levels[-1].shape[-2:])
            levels.append(F.adaptive_avg_pool2d(z, (height, width)))
        hidden = [conv(x) for conv, x in zip(self.inputs, levels, strict=True)]
        for i in range(0, len(self.mixers), self.depth):
            for level in range(1, self.depth):  # fine to coarse
                height, width = hidden[level].shape[-2:]
                small = F.adaptive_avg_pool2d(hidden[level - 1], (height, width))
                hidden[level] = hidden[level] + small
            for level in reversed(range(self.depth)):  # coarse to fine
                if level + 1 < self.depth:
                    large = F.interpolate(hidden[level + 1], size=hidden[level].shape[-2:])
                    hidden[level] = hidden[level] + large
                hidden[level] = self.mixers[i + level](hidden[level], condition)
        strength = per_sample(torch.log1p(guidance_strength(w)), z)
        made: list[torch.Tensor] = []
        for level, conv in enumerate(self.outputs):
            sizes = [c for c, l in self.features if l == level]
            made += (strength * conv(hidden[level])).split(sizes, dim=1)
        return GuideOutput(encoder=(tuple(made[:-1]), made[-1]))


class Mixer(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution, modulated by the condition, as a residual."""

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
