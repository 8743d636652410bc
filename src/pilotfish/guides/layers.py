"""What several guides are built from."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.guidance import fourier_features
from pilotfish.interface import GuideInputs

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
        negative: whether it is told of the negative prompt itself as well. The difference to the
            prompt says which way to go; how far that leads depends on what is left behind.
    """

    def __init__(self, text: int, width: int, negative: bool = False) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(2 * FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.text = nn.Linear(text, width, bias=False)
        self.negative = silent(nn.Linear(text, width, bias=False)) if negative else None

    def forward(self, inputs: GuideInputs) -> torch.Tensor:
        """The vectors, (N, width)."""
        t_and_w = torch.stack([inputs.timestep.float() / 4000, inputs.guidance_scale / 32], 1)
        embedded = fourier_features(t_and_w, FEATURES, longest=1.0).flatten(1)
        against = inputs.negative_hidden_states
        text = (inputs.encoder_hidden_states - against).mean(1)
        seen = self.embed(embedded.to(text.dtype)) + self.text(text)
        told = self.told(inputs)
        return F.silu(seen if told is None else seen + told)

    def told(self, inputs: GuideInputs) -> torch.Tensor | None:
        """What is seen of the negative prompt itself, (N, width), where that is looked at."""
        if self.negative is None:
            return None
        told: torch.Tensor = self.negative(inputs.negative_hidden_states.mean(1))
        return told
