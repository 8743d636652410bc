"""Adapter guidance distillation (AGD), arXiv 2503.07274: adapters for the cross-attentions.

The base stays frozen. An adapter of w, t and the prompt c is added to every cross-attention A::

    A(x) + a(x; w, t, c)

The paper has two adapters, both trained on samples of CFG trajectories:

- additive: one vector for all positions, of the embedded w, t and prompt;
- cross-attention: queries from the positions; keys and values from w, t and the prompt's tokens.

They are not zero at w = 1 by construction; the pipeline does not call a guide there.
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

from baselines.modules import cross_attentions, key
from pilotfish.backbones import Backbone
from pilotfish.guidance import fourier_features
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import zero_module
from pilotfish.interface import GuideInputs, GuideOutput

FEATURES = 32


@dataclass(frozen=True)
class AdditiveSettings:
    """Settings of the additive adapters."""

    width: int = 96
    """Channels inside an adapter."""


@dataclass(frozen=True)
class CrossAttentionSettings:
    """Settings of the cross-attention adapters."""

    width: int = 64
    """Channels inside an adapter."""


class _AGD(Guide):
    """An adapter for every cross-attention.

    Args:
        signature: of the denoiser.
        sites: channels of the cross-attentions, by name.
        width: channels inside an adapter.
        guidance_scale_range: the (low, high) of w in training.
    """

    adapter: type[nn.Module]

    def _build(self, signature: Mapping[str, Any], sites: Mapping[str, int], width: int) -> None:
        self.scale = ScalarEmbedding(width, longest=32.0)
        self.time = ScalarEmbedding(width, longest=4.0)
        self.text = nn.Linear(signature["text_dim"], width)
        self.adapters = nn.ModuleDict({key(n): self.adapter(c, width) for n, c in sites.items()})

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a denoiser with cross-attention."""
        signature = Backbone.of(denoiser).signature(prediction_type)
        return cls(signature, cross_attentions(denoiser), **config)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The cross-attentions."""
        return tuple(self.config.sites)

    def condition(self, inputs: GuideInputs) -> torch.Tensor:
        """The input of all adapters: w, t and prompt, embedded."""
        raise NotImplementedError

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        condition = self.condition(inputs)
        return GuideOutput(
            residuals={
                name: partial(_add, self.adapters[key(name)], condition)
                for name in self.config.sites
            }
        )


def _add(
    adapter: nn.Module, condition: torch.Tensor, module_input: torch.Tensor,
    module_output: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    changed: torch.Tensor = module_output + adapter(module_input, condition)
    return changed


class ScalarEmbedding(nn.Module):
    """(N,) numbers -> (N, width): Fourier features through a small network."""

    def __init__(self, width: int, longest: float) -> None:
        super().__init__()
        self.longest = longest
        self.net = nn.Sequential(
            nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = fourier_features(x, FEATURES, self.longest)
        embedded: torch.Tensor = self.net(features.to(next(self.parameters()).dtype))
        return embedded


class AdditiveAdapter(nn.Module):
    """One vector for all positions."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width),
            zero_module(nn.Linear(width, channels)),
        )  # fmt: skip

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(N, L, C) and (N, 1, width) -> (N, 1, C)."""
        vector: torch.Tensor = self.net(condition)
        return vector


class CrossAttentionAdapter(nn.Module):
    """A cross-attention from the positions to the condition."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = zero_module(nn.Linear(width, channels))

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """(N, L, C) and (N, K, width) -> (N, L, C)."""
        keys, values = self.key_value(condition).chunk(2, -1)
        added: torch.Tensor = self.out(F.scaled_dot_product_attention(self.query(x), keys, values))
        return added


class AdditiveAGD(_AGD, guide_type="agd", settings=AdditiveSettings):
    """AGD with additive adapters. The arguments are those of :class:`_AGD`."""

    title = "AGD, additive"
    adapter = AdditiveAdapter

    @register_to_config
    def __init__(
        self, signature: dict[str, Any], sites: dict[str, int], width: int = 96,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None, trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:  # fmt: skip
        super().__init__()
        self._build(signature, sites, width)

    def condition(self, inputs: GuideInputs) -> torch.Tensor:
        """(N, 1, width)."""
        text = self.text(inputs.text.embeds.mean(1))
        total: torch.Tensor = self.scale(inputs.guidance_scale) + self.time(inputs.time) + text
        return total[:, None]


class CrossAttentionAGD(_AGD, guide_type="agd-attention", settings=CrossAttentionSettings):
    """AGD with cross-attention adapters. The arguments are those of :class:`_AGD`."""

    title = "AGD, cross-attention"
    adapter = CrossAttentionAdapter

    @register_to_config
    def __init__(
        self, signature: dict[str, Any], sites: dict[str, int], width: int = 64,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None, trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:  # fmt: skip
        super().__init__()
        self._build(signature, sites, width)

    def condition(self, inputs: GuideInputs) -> torch.Tensor:
        """(N, 2 + L, width)."""
        scale, time = self.scale(inputs.guidance_scale), self.time(inputs.time)
        return torch.cat([scale[:, None], time[:, None], self.text(inputs.text.embeds)], 1)
