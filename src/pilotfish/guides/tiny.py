"""The tiny guide: it lets the base itself do most of the work.

CFG adds to the conditional prediction the way from the unconditional to the conditional one
once more, ``w - 1`` times. The guide does that in three places of the one pass:

- *Text.* The prompt is pushed on, away from the negative prompt, before it enters the base:
  ``c + g (c - n)`` with a learned gain g. To first order in g the base then goes the way of
  equation (1) by itself, with its own weights, whichever fine-tune they are of.
- *Layers.* What each decoder layer makes is read through a 1x1 convolution of low rank,
  modulated by w, timestep and text, and the answer is added to it.
- *Prediction.* A small head, linear in ``w - 1`` as CFG is, does the rest; it also sees the
  latents.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.contract import GuideError, GuideInputs, Injection, LayerAddition
from pilotfish.denoisers import decoder_channels, fingerprint
from pilotfish.guidance import guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import Condition, silent


class TinyGuide(Guide):
    """See the module.

    Args:
        denoiser: the fingerprint of the denoiser.
        push: whether the text is pushed.
        rank: channels of each layer's addition; 0 leaves the layers alone.
        head: channels of the head; 0 leaves the prediction alone.
        condition: width of the embedding of t, w and text.
        guidance_scale_range: the (low, high) of w in training.

    Raises:
        GuideError: nothing is left to add.
    """

    @register_to_config
    def __init__(
        self,
        denoiser: dict[str, Any],
        push: bool = True,
        rank: int = 20,
        head: int = 48,
        condition: int = 32,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        pilotfish_version: str = "0.1.0",
    ) -> None:
        super().__init__()
        if not (push or rank or head):
            raise GuideError("a tiny guide needs at least one of push, rank and head")
        self.embedding = Condition(denoiser["cross_attention_dim"], condition)
        self.text = silent(nn.Linear(condition, 1)) if push else None
        channels = decoder_channels(denoiser) if rank else []
        self.layers = nn.ModuleList([LowRank(c, rank) for c in channels])
        self.modulate = nn.Linear(condition, 2 * rank * len(channels)) if rank else None
        features, latents = denoiser["block_out_channels"][0], denoiser["in_channels"]
        self.output = Head(features, latents, head, condition) if head else None

    @classmethod
    def for_denoiser(cls, unet: UNet2DConditionModel, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet."""
        return cls(fingerprint(unet, prediction_type), **config)

    def forward(self, inputs: GuideInputs) -> Injection:
        condition = self.embedding(inputs)
        text, latents = inputs.encoder_hidden_states, inputs.latents
        strength = per_sample(guidance_strength(inputs.guidance_scale), latents)
        # inside the network the effect of a change saturates; at the prediction it is linear
        inside = torch.log1p(strength)
        pushed, output = None, None
        layers: tuple[LayerAddition, ...] = ()
        if self.text is not None:
            gain = inside[:, :, 0, 0] * self.text(condition)
            pushed = gain[:, :, None] * (text - inputs.negative_hidden_states)
        if self.modulate is not None:
            modulation = self.modulate(condition)[:, :, None, None].chunk(len(self.layers), 1)
            layers = tuple(
                partial(layer, modulation=m, strength=inside)
                for layer, m in zip(self.layers, modulation, strict=True)
            )
        if self.output is not None:
            output = partial(self.output, latents=latents, condition=condition, strength=strength)
        return Injection(text=pushed, layers=layers, output=output)


class LowRank(nn.Module):
    """``strength * up(silu(gain * down(norm(x)) + shift))``; what comes before ``up`` has
    ``rank`` channels."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, rank, 1)
        self.up = silent(nn.Conv2d(rank, channels, 1))

    def forward(
        self, made: torch.Tensor, modulation: torch.Tensor, strength: torch.Tensor
    ) -> torch.Tensor:
        """(N, channels, h, w), (N, 2 rank, 1, 1), (N, 1, 1, 1) -> what is added to ``made``."""
        gain, shift = modulation.chunk(2, 1)
        hidden = torch.addcmul(shift, self.down(F.group_norm(made, 1)), 1 + gain)
        added: torch.Tensor = strength * self.up(F.silu(hidden))
        return added


class Head(nn.Module):
    """Reads the last features, the prediction and the latents; answers in the prediction's shape.

    Beside a small convolutional path it scales prediction and latents channel by channel: at
    high noise the unconditional prediction is close to a constant, and CFG little more than
    that scaling.
    """

    def __init__(self, features: int, channels: int, width: int, condition: int) -> None:
        super().__init__()
        self.splits = [width, width, channels, channels]
        self.inputs = nn.Conv2d(features + 2 * channels, width, 1)
        self.spread = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.modulate = nn.Linear(condition, sum(self.splits))
        self.outputs = silent(nn.Conv2d(width, channels, 1))
        with torch.no_grad():  # the two channel-wise scalings are silent as well
            for parameter in self.modulate.parameters():
                parameter[2 * width :] = 0

    def forward(
        self, features: torch.Tensor, prediction: torch.Tensor, *, latents: torch.Tensor,
        condition: torch.Tensor, strength: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """(N, features, h, w) and (N, C, h, w) -> (N, C, h, w), what is added to the latter."""
        modulation = self.modulate(condition)[:, :, None, None].split(self.splits, 1)
        gain, shift, of_prediction, of_latents = modulation
        seen = torch.cat([F.group_norm(features, 1), prediction, latents], 1)
        hidden = torch.addcmul(shift, self.spread(self.inputs(seen)), 1 + gain)
        made: torch.Tensor = self.outputs(F.silu(hidden))
        added: torch.Tensor = strength * (made + of_prediction * prediction + of_latents * latents)
        return added
