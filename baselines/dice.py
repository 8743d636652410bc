"""DICE, arXiv 2502.03726 (AAAI 2026): guidance moved into the text embedding.

The base stays frozen. A sharpener r sees the prompt and the negative prompt and the base is
asked once, with ``c' = c + alpha r(c, n)``. It is trained at one scale ``w0``; the dial alpha is
turned at inference. Here ``alpha = (w - 1) / (w0 - 1)``, so that 1 stands for the trained scale
and 0 for none.
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
    """What can be chosen of the sharpener."""

    width: int = 96
    """Channels inside the sharpener."""
    heads: int = 4
    """Heads of its attention."""
    trained_scale: float = 4.0
    """w0."""


class TextSharpener(Guide, guide_type="dice", settings=DICESettings):
    """See the module.

    Args:
        signature: of the denoiser.
        width: channels inside the sharpener.
        heads: of its attention.
        trained_scale: w0.
        guidance_scale_range: what the dial is turned over.

    Raises:
        GuideError: ``trained_scale`` is not above 1.
    """

    learning_rate = 1e-3

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        width: int = 96,
        heads: int = 4,
        trained_scale: float = 4.0,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
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
        heard, _ = self.attention(prompt, negative, negative, need_weights=False)
        dial = guidance_strength(inputs.guidance_scale) / (self.config.trained_scale - 1)
        sharper: torch.Tensor = self.outputs(F.relu(heard))
        return GuideOutput(text=dial.to(sharper.dtype)[:, None, None] * sharper)
