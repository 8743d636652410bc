"""Adapter guidance distillation (AGD), arXiv 2503.07274: adapters beside the attentions.

The base stays frozen. Beside every cross-attention ``A`` stands an adapter that knows w, t and
the prompt, and its answer is added: ``A(x) + a(x; w, t, c)``. Two kinds are described, and both
are trained on states of CFG trajectories.

- *Additive*: a vector of the embedded w, t and prompt alone, the same at every place.
- *Cross-attention*: the places ask; w, t and the prompt's tokens, each embedded, answer.

Nothing makes them vanish at w = 1, as our own guides do by construction; there the pipeline
does not ask them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from baselines.sites import cross_attentions, dotless
from pilotfish.backbones import Backbone
from pilotfish.guidance import fourier_features
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import zero_module
from pilotfish.interface import GuideInputs, GuideOutput

FEATURES = 32


@dataclass(frozen=True)
class AGDSettings:
    """What can be chosen of the additive kind."""

    width: int = 96
    """Channels inside an adapter."""


@dataclass(frozen=True)
class AGDAttentionSettings:
    """What can be chosen of the cross-attention kind."""

    width: int = 64
    """Channels inside an adapter."""


class ScalarEmbedding(nn.Module):
    """(N,) numbers -> (N, width) vectors: Fourier features through a small network."""

    def __init__(self, width: int, longest: float) -> None:
        super().__init__()
        self.longest = longest
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The vectors."""
        features = fourier_features(x, FEATURES, self.longest)
        made: torch.Tensor = self.net(features.to(next(self.parameters()).dtype))
        return made


class _Adapters(Guide):
    """What both kinds share: an adapter for every cross-attention.

    Args:
        signature: of the denoiser.
        sites: the cross-attentions, name -> channels.
        width: channels inside an adapter.
        guidance_scale_range: the (low, high) of w in training.
    """

    def _build(self, signature: Mapping[str, Any], sites: Mapping[str, int], width: int) -> None:
        self.scale = ScalarEmbedding(width, longest=32.0)
        self.time = ScalarEmbedding(width, longest=4.0)
        self.text = nn.Linear(signature["text_dim"], width)
        self.adapters = nn.ModuleDict(
            {dotless(name): self._adapter(c, width) for name, c in sites.items()}
        )

    def _adapter(self, channels: int, width: int) -> nn.Module:
        raise NotImplementedError

    def _known(self, inputs: GuideInputs) -> torch.Tensor:
        """What every adapter is shown of w, t and prompt."""
        raise NotImplementedError

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet."""
        return cls(
            Backbone.of(denoiser).signature(prediction_type), cross_attentions(denoiser), **config
        )

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Every cross-attention."""
        return tuple(self.config.sites)

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        known = self._known(inputs)
        return GuideOutput(
            residuals={
                name: partial(self._add, self.adapters[dotless(name)], known)
                for name in self.config.sites
            }
        )

    @staticmethod
    def _add(
        adapter: nn.Module, known: torch.Tensor, entered: torch.Tensor, made: torch.Tensor
    ) -> torch.Tensor:
        changed: torch.Tensor = made + adapter(entered, known)
        return changed


class AdditiveAdapters(_Adapters, guide_type="agd", settings=AGDSettings):
    """The additive kind. See the module and :class:`_Adapters`."""

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        sites: dict[str, int],
        width: int = 96,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
        super().__init__()
        self._build(signature, sites, width)

    def _adapter(self, channels: int, width: int) -> nn.Module:
        return Additive(channels, width)

    def _known(self, inputs: GuideInputs) -> torch.Tensor:
        text = self.text(inputs.text.embeds.mean(1))
        known: torch.Tensor = self.scale(inputs.guidance_scale) + self.time(inputs.time) + text
        return known[:, None]


class Additive(nn.Module):
    """The vector that is added at every place."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width),
            zero_module(nn.Linear(width, channels)),
        )  # fmt: skip

    def forward(self, x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """(N, L, C) and (N, 1, width) -> (N, 1, C)."""
        added: torch.Tensor = self.net(known)
        return added


class CrossAttentionAdapters(_Adapters, guide_type="agd-attention", settings=AGDAttentionSettings):
    """The cross-attention kind. See the module and :class:`_Adapters`."""

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        sites: dict[str, int],
        width: int = 64,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
        super().__init__()
        self._build(signature, sites, width)

    def _adapter(self, channels: int, width: int) -> nn.Module:
        return Asking(channels, width)

    def _known(self, inputs: GuideInputs) -> torch.Tensor:
        scale, time = self.scale(inputs.guidance_scale), self.time(inputs.time)
        text = self.text(inputs.text.embeds)
        return torch.cat([scale[:, None], time[:, None], text], 1)


class Asking(nn.Module):
    """A cross-attention from the places to what is known."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.ask = nn.Linear(channels, width, bias=False)
        self.keys_values = nn.Linear(width, 2 * width, bias=False)
        self.outputs = zero_module(nn.Linear(width, channels))

    def forward(self, x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """(N, L, C) and (N, K, width) -> (N, L, C)."""
        key, value = self.keys_values(known).chunk(2, -1)
        answer = F.scaled_dot_product_attention(self.ask(x), key, value)
        added: torch.Tensor = self.outputs(answer)
        return added
