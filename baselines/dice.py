"""DICE, arXiv 2502.03726 (AAAI 2026): guidance moved into the text embedding.

The base stays frozen and runs once, on the sharpened text ``c + alpha r(c, n)``. The sharpener r
reads prompt and negative prompt. It is trained at one guidance scale ``w0``; alpha is chosen at
inference. Here ``alpha = (w - 1) / (w0 - 1)``, which is 1 at w0 and 0 at w = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.guidance import guidance_strength
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import zero_module
from pilotfish.interface import GuideError, GuideInputs, GuideOutput


@dataclass(frozen=True)
class DICESettings:
    """Settings of the sharpener."""

    width: int = 96
    """Channels inside it."""
    heads: int = 4
    """Heads of its attention."""
    trained_scale: float = 4.0
    """The guidance scale w0 of its training."""


class DICE(Guide, guide_type="dice", settings=DICESettings):
    """See the module.

    Args:
        signature: of the denoiser.
        width: channels inside the sharpener.
        heads: of its attention.
        trained_scale: the guidance scale w0 of its training.
        guidance_scale_range: the (low, high) of w at inference.

    Raises:
        GuideError: ``trained_scale`` is not above 1.
    """

    title = "DICE"
    learning_rate = 1e-3

    @register_to_config
    def __init__(
        self, signature: dict[str, Any], width: int = 96, heads: int = 4,
        trained_scale: float = 4.0, guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None, trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:  # fmt: skip
        super().__init__()
        if trained_scale <= 1:
            raise GuideError(f"trained_scale must be above 1, not {trained_scale}")

        text = signature["text_dim"]
        self.inputs = nn.Linear(text, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.outputs = zero_module(nn.Linear(width, text))

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        prompt = F.relu(self.inputs(inputs.text.embeds))
        negative = F.relu(self.inputs(inputs.negative.expand(len(inputs.text)).embeds))
        attended, _ = self.attention(prompt, negative, negative, need_weights=False)
        sharper: torch.Tensor = self.outputs(F.relu(attended))
        alpha = guidance_strength(inputs.guidance_scale) / (self.config.trained_scale - 1)
        return GuideOutput(text=alpha.to(sharper.dtype)[:, None, None] * sharper)
