"""What several guides are built from."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.guidance import fourier_features
from pilotfish.interface import TextConditions

FEATURES = 16
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zero_module(layer: Layer) -> Layer:
    """The layer with all parameters zero, so that it adds nothing before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Condition(nn.Module):
    """One vector of time, guidance scale, and the difference of prompt and negative prompt.

    Args:
        text_dim: width of the text's embeddings.
        width: of the vector.
        negative: whether it is conditioned on the negative prompt itself as well. The difference
            gives the direction; its effect also depends on the negative prompt.
        normalize: divide the embeddings' means by their root mean square. Encoders differ
            much in it, and the activations of this network saturate where it is large.
    """

    def __init__(
        self, text_dim: int, width: int, negative: bool = False, normalize: bool = True
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalize = normalize
        self.embed = nn.Sequential(
            nn.Linear(2 * FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.text = nn.Linear(text_dim, width, bias=False)
        self.negative = zero_module(nn.Linear(text_dim, width, bias=False)) if negative else None

    def forward(
        self, time: torch.Tensor, guidance_scale: torch.Tensor, text: TextConditions,
        negative: TextConditions, age: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The vectors, (..., N, width), of times (..., N) and scales that broadcast with them.

        Args:
            age: (..., N, width) added to the embedding, where a refresh is known.
        """
        time, scale = torch.broadcast_tensors(time.float() / 4, guidance_scale.float() / 32)
        embedded = fourier_features(torch.stack([time, scale], -1), FEATURES, longest=1.0)
        difference = _difference(text, negative)
        if self.normalize:
            difference = _over_size(difference, text.mean())
        seen = self.embed(embedded.flatten(-2).to(text.dtype)) + self.text(difference)
        seen = seen if age is None else seen + age.to(seen.dtype)
        of_negative = self.of_negative(negative)
        return F.silu(seen if of_negative is None else seen + of_negative)

    def of_negative(self, negative: TextConditions) -> torch.Tensor | None:
        """(N or 1, width) the projected mean of the negative prompt, if the guide has one."""
        if self.negative is None:
            return None
        mean = negative.mean()
        seen: torch.Tensor = self.negative(_over_size(mean, mean) if self.normalize else mean)
        return seen


def _over_size(x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Each row of ``x`` divided by the root mean square of that of ``of``, (N, D) both. Some
    pipelines have zeros for an empty prompt."""
    size = of.float().square().mean(-1, keepdim=True).sqrt()
    return (x.float() / (size + 1e-6)).to(x.dtype)


def _difference(text: TextConditions, negative: TextConditions) -> torch.Tensor:
    """(N, D) mean over the tokens of what the prompt has and the negative prompt has not."""
    if text.mask is None and text.embeds.shape[1] == negative.embeds.shape[1]:
        return (text.embeds - negative.embeds).mean(1)
    return text.mean() - negative.mean()
