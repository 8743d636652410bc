"""The tiny guide: it lets the base itself do most of the work.

CFG adds to the conditional prediction the way from the unconditional to the conditional one
once more, ``w - 1`` times. The guide does that in five places of the one pass:

- *Text.* The prompt is pushed on, away from the negative prompt, before it enters the base:
  ``c + g (c - n)`` with a learned gain g. To first order in g the base then goes the way of
  equation (1) by itself, with its own weights, whichever fine-tune they are of.
- *Attention.* The answer of each cross-attention layer of mid block and decoder is pushed
  on, away from what the layer would answer to the negative prompt: ``a + g (a - a_n)``, for the
  price of a few more keys and values (NAG, arXiv 2505.21179, with learned gains).
- *Embedding.* Where the embedding of the timestep holds the text as well, what each residual
  layer takes from it is pushed on in the same way.
- *Layers.* What each decoder layer makes is read through a convolution of low rank,
  modulated by w, timestep and text, and the answer is added to it.
- *Prediction.* A small head, linear in ``w - 1`` as CFG is, does the rest; it also sees the
  latents, and may be given a coarse picture of what the negative prompt by itself leads to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.backbones import cross_attention_layers, decoder_layers, embedding_layers
from pilotfish.guidance import guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import Condition, silent
from pilotfish.interface import GuideError, GuideInputs, GuideOutput, Residual

PREDICTION = "conv_out"
SIDE = 8
"""Pixels of the negative prompt's picture, each way; it is stretched to the latents' size."""


class TinyGuide(Guide):
    """See the module.

    Args:
        denoiser: the fingerprint of the denoiser.
        push: whether the text is pushed.
        attention: whether the answers of the cross-attention layers are.
        embedding: whether what the residual layers take from the embedding is.
        negative: whether the embedding of t, w and text is told of the negative prompt itself, and
            not only of what the prompt has that it has not.
        rank: channels of each layer's addition; 0 leaves the layers alone.
        head: channels of the head; 0 leaves the prediction alone.
        picture: pictures that the negative prompt's own is mixed from; 0: it has none. Needs
            ``negative`` and a head.
        condition: width of the embedding of t, w and text.
        guidance_scale_range: the (low, high) of w in training.
        timesteps: of a guide distilled to few steps, the only ones that it knows.
        trained_on: name and revision of the base, where they are known.

    Raises:
        GuideError: nothing is left to add, or the picture lacks what it needs.
    """

    learning_rate = 1e-2

    @register_to_config
    def __init__(
        self,
        denoiser: dict[str, Any],
        push: bool = True,
        attention: bool = True,
        embedding: bool = True,
        negative: bool = False,
        rank: int = 28,
        head: int = 48,
        picture: int = 0,
        condition: int = 32,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        timesteps: Sequence[int] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.1.0",
    ) -> None:
        super().__init__()
        if not (push or attention or embedding or rank or head):
            raise GuideError(
                "a tiny guide needs at least one of push, attention, embedding, rank and head"
            )
        if picture and not (negative and head):
            raise GuideError(
                "the picture of the negative prompt needs a guide that looks at that prompt "
                "(negative), and a head"
            )
        self.conditioning = Condition(denoiser["cross_attention_dim"], condition, negative)
        self.text = silent(nn.Linear(condition, 1)) if push else None
        self.pushed = cross_attention_layers(denoiser) if attention else {}
        self.pushed |= dict.fromkeys(embedding_layers(denoiser), 1) if embedding else {}
        gains = sum(self.pushed.values())
        self.gains = silent(nn.Linear(condition, gains)) if gains else None
        layers = decoder_layers(denoiser) if rank else {}
        self.names = tuple(layers)
        self.layers = nn.ModuleList([Layer(c, rank) for c in layers.values()])
        features, latents = denoiser["block_out_channels"][0], denoiser["in_channels"]
        self.output = Head(features, latents, head) if head else None
        self.negative_picture = Picture(condition, latents, picture) if picture else None
        # gain and shift of every layer and of the head, then the head's two scalings
        self.ranks = [2 * r for r in (*[rank] * len(layers), head) if r]
        self.scalings = 2 * latents if head else 0
        answers = sum(self.ranks) + self.scalings
        self.modulate = nn.Linear(condition, answers) if answers else None
        if self.modulate is not None:
            self._begin_plainly(self.modulate)

    @property
    def touches(self) -> tuple[str, ...]:
        """The decoder's layers and the last convolution, those that have a part."""
        return (*self.names, PREDICTION) if self.output is not None else self.names

    @property
    def pushes(self) -> tuple[str, ...]:
        """Cross-attention layers of mid block and decoder, and residual layers of the whole."""
        return tuple(self.pushed)

    @torch.no_grad()
    def _begin_plainly(self, modulate: nn.Linear) -> None:
        """Gains start around 1; the head's scalings are silent until they have learnt something."""
        start = 0
        for size in self.ranks:
            modulate.bias[start : start + size // 2] += 1
            start += size
        modulate.weight[start:] = 0
        modulate.bias[start:] = 0

    def forward(self, inputs: GuideInputs) -> GuideOutput:
        condition = self.conditioning(inputs)
        text, latents = inputs.encoder_hidden_states, inputs.latents
        strength = per_sample(guidance_strength(inputs.guidance_scale), latents)
        # inside the network the effect of a change saturates; at the prediction it is linear
        inside = torch.log1p(strength)
        further = None
        if self.text is not None:
            gain = inside[..., 0] * self.text(condition)[:, :, None]
            further = gain * (text - inputs.negative_hidden_states)
        pushes: dict[str, torch.Tensor] = {}
        if self.gains is not None:
            gains = inside[..., 0, 0] * self.gains(condition)
            parts = gains.split(list(self.pushed.values()), 1)
            pushes = dict(zip(self.pushed, parts, strict=True))
        modules: dict[str, Residual] = {}
        if self.modulate is not None:
            answers = self.modulate(condition).split([*self.ranks, self.scalings], 1)
            modules = {
                name: partial(layer, modulation=m, strength=inside)
                for name, layer, m in zip(self.names, self.layers, answers, strict=False)
            }
            if self.output is not None:
                picture = None
                if self.negative_picture is not None:
                    picture = self.negative_picture(self.conditioning.told(inputs), condition)
                modules[PREDICTION] = partial(
                    self.output, latents=latents, modulation=answers[-2], scalings=answers[-1],
                    picture=picture, strength=strength,
                )  # fmt: skip
        return GuideOutput(text=further, pushes=pushes, modules=modules)


class LowRank(nn.Module):
    """``strength * up silu(h + near h)`` with ``h = gain * down x + shift``, of ``rank`` channels.

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

    def forward(
        self, x: torch.Tensor, modulation: torch.Tensor, strength: torch.Tensor
    ) -> torch.Tensor:
        """(N, entering, h, w), (N, 2 rank), (N, 1, 1, 1) -> (N, leaving, h, w)."""
        gain, shift = modulation[:, :, None].chunk(2, 1)
        hidden = torch.baddbmm(shift, gain * self.down, x.flatten(2))
        hidden = hidden.view(len(x), -1, *x.shape[-2:])
        hidden = F.silu(hidden + self.near(hidden)).flatten(2)
        made = torch.bmm(strength[..., 0] * self.up, hidden)
        return made.view(len(x), -1, *x.shape[-2:])


class Layer(nn.Module):
    """What is added to a layer of the decoder: a function of what the layer made."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.path = LowRank(channels, channels, rank)

    def forward(
        self, entered: torch.Tensor, made: torch.Tensor, *,
        modulation: torch.Tensor, strength: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """(N, channels, h, w) twice, (N, 2 rank), (N, 1, 1, 1) -> (N, channels, h, w)."""
        added: torch.Tensor = self.path(F.group_norm(made, 1), modulation, strength)
        return added


class Head(nn.Module):
    """Reads the last features, the prediction and the latents; answers in the prediction's shape.

    The features come out of the denoiser's last normalisation and need none here. Beside that
    path the head scales prediction and latents channel by channel: at high noise the
    unconditional prediction is close to a constant, and CFG little more than that scaling; with a
    negative prompt it is close to the picture that that prompt leads to.
    """

    def __init__(self, features: int, channels: int, width: int) -> None:
        super().__init__()
        self.path = LowRank(features + 2 * channels, channels, width)

    def forward(
        self, features: torch.Tensor, prediction: torch.Tensor, *, latents: torch.Tensor,
        modulation: torch.Tensor, scalings: torch.Tensor, picture: torch.Tensor | None,
        strength: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """(N, features, h, w) and (N, C, h, w) -> (N, C, h, w), what is added to the latter.

        ``scalings`` are (N, 2 C), first of the prediction, then of the latents; ``picture`` is
        (N, C, SIDE, SIDE).
        """
        of_prediction, of_latents = scalings[:, :, None, None].chunk(2, 1)
        made = self.path(torch.cat([features, prediction, latents], 1), modulation, strength)
        linear = torch.addcmul(of_prediction * prediction, of_latents, latents)
        if picture is not None:
            linear = linear + F.interpolate(picture, prediction.shape[-2:], mode="bilinear")
        added: torch.Tensor = torch.addcmul(made, strength, linear)
        return added


class Picture(nn.Module):
    """A coarse picture of what the base predicts with the negative prompt alone.

    At high noise, where the latents say nothing yet, that prediction is mostly a function of its
    prompt. The one pass, which is the other prompt's, holds nothing of it.

    Args:
        width: of the embedding of t, w and text, and of what it is told of the negative prompt.
        channels: of the prediction.
        mixed: pictures that it is mixed from.
    """

    def __init__(self, width: int, channels: int, mixed: int) -> None:
        super().__init__()
        self.told, self.seen = nn.Linear(width, mixed), nn.Linear(width, mixed, bias=False)
        self.pictures = silent(nn.Linear(mixed, channels * SIDE**2))

    def forward(self, told: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(N, width) twice -> (N, channels, SIDE, SIDE)."""
        shares = F.silu(self.told(told) + self.seen(condition))
        made: torch.Tensor = self.pictures(shares)
        return made.view(len(made), -1, SIDE, SIDE)
