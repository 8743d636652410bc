"""What several guides are built from."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.contract import GuideInputs
from pilotfish.guidance import fourier_features

FEATURES = 16
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def silent(layer: Layer) -> Layer:
    """The layer, answering zero until it has learnt something."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Condition(nn.Module):
    """One vector of timestep, scale, and what the prompt has that the negative prompt has not.

    Args:
        text: width of the encoder hidden states.
        width: of the vector.
    """

    def __init__(self, text: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(2 * FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.text = nn.Linear(text, width, bias=False)

    def forward(self, inputs: GuideInputs) -> torch.Tensor:
        """The vectors, (N, width)."""
        t = fourier_features(inputs.timestep, FEATURES, longest=4000.0)
        w = fourier_features(inputs.guidance_scale, FEATURES, longest=32.0)
        text = (inputs.encoder_hidden_states - inputs.negative_hidden_states).mean(1)
        seen = torch.cat([t, w], 1).to(text.dtype)
        return F.silu(self.embed(seen) + self.text(text))
