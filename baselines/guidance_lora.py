"""CFG LoRA (LongLive-Plug, arXiv 2609.38154): guidance as a LoRA whose weight is the dial.

A LoRA is trained at one scale ``w0`` so that the base with it predicts what CFG does at w0.
Its weight turns the scale: ``W x + lambda B A x`` with ``w = 1 + lambda (w0 - 1)``. At one fixed
scale it can be merged into the weights and costs nothing. Here it stays unmerged, so that every
sample of a batch may have its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from baselines.sites import dotless, weights
from pilotfish.backbones import Backbone
from pilotfish.guidance import guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import zero_module
from pilotfish.interface import GuideError, GuideInputs, GuideOutput

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class GuidanceLoRASettings:
    """What can be chosen of the LoRA."""

    rank: int = 4
    """Of every pair of matrices."""
    trained_scale: float = 4.0
    """w0."""


class GuidanceLoRA(Guide, guide_type="cfg-lora", settings=GuidanceLoRASettings):
    """See the module.

    Args:
        signature: of the denoiser.
        sites: the linear layers, name -> [out, in].
        rank: of every pair of matrices.
        trained_scale: w0.
        guidance_scale_range: what the dial is turned over.

    Raises:
        GuideError: ``trained_scale`` is not above 1.
    """

    learning_rate = 2e-3

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        sites: dict[str, list[int]],
        rank: int = 4,
        trained_scale: float = 4.0,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
        super().__init__()
        if trained_scale <= 1:
            raise GuideError(f"trained_scale must be above 1, not {trained_scale}")

        self.pairs = nn.ModuleDict(
            {
                dotless(name): nn.Sequential(
                    nn.Linear(entering, rank, bias=False),
                    zero_module(nn.Linear(rank, leaving, bias=False)),
                )
                for name, (leaving, entering) in sites.items()
            }
        )

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet, on the projections of all its attentions."""
        return cls(
            Backbone.of(denoiser).signature(prediction_type), weights(denoiser, ATTENTION), **config
        )

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Every layer that has a pair of matrices."""
        return tuple(self.config.sites)

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        dial = guidance_strength(inputs.guidance_scale) / (self.config.trained_scale - 1)
        return GuideOutput(
            residuals={
                name: partial(self._add, self.pairs[dotless(name)], dial)
                for name in self.config.sites
            }
        )

    @staticmethod
    def _add(
        pair: nn.Module, dial: torch.Tensor, entered: torch.Tensor, made: torch.Tensor
    ) -> torch.Tensor:
        added: torch.Tensor = pair(entered)
        return made + per_sample(dial, added) * added
