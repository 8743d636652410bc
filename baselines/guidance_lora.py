"""CFG LoRA (LongLive-Plug, arXiv 2609.38154): a LoRA whose weight sets the guidance scale.

The LoRA is trained at one scale ``w0`` so that the base with it predicts what CFG predicts there.
Its weight lambda sets the scale at inference: ``W x + lambda B A x`` with
``w = 1 + lambda (w0 - 1)``. Merged into the weights, it costs nothing at one fixed scale. Here it
stays unmerged, so that every sample of a batch may have its own scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from baselines.modules import key, weight_shapes
from pilotfish.backbones import Backbone
from pilotfish.guidance import guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import zero_module
from pilotfish.interface import GuideError, GuideInputs, GuideOutput

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class GuidanceLoRASettings:
    """Settings of the LoRA."""

    rank: int = 4
    """Rank of every pair of matrices."""
    trained_scale: float = 4.0
    """The guidance scale w0 of its training."""


class GuidanceLoRA(Guide, guide_type="cfg-lora", settings=GuidanceLoRASettings):
    """See the module.

    Args:
        signature: of the denoiser.
        sites: [out, in] of the linear layers, by name.
        rank: of every pair of matrices.
        trained_scale: the guidance scale w0 of its training.
        guidance_scale_range: the (low, high) of w at inference.

    Raises:
        GuideError: ``trained_scale`` is not above 1.
    """

    title = "CFG LoRA"
    learning_rate = 2e-3

    @register_to_config
    def __init__(
        self, signature: dict[str, Any], sites: dict[str, list[int]], rank: int = 4,
        trained_scale: float = 4.0, guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None, trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:  # fmt: skip
        super().__init__()
        if trained_scale <= 1:
            raise GuideError(f"trained_scale must be above 1, not {trained_scale}")

        self.pairs = nn.ModuleDict(
            {
                key(name): nn.Sequential(
                    nn.Linear(fan_in, rank, bias=False),
                    zero_module(nn.Linear(rank, fan_out, bias=False)),
                )
                for name, (fan_out, fan_in) in sites.items()
            }
        )

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for the projections of all attentions of a denoiser."""
        signature = Backbone.of(denoiser).signature(prediction_type)
        return cls(signature, weight_shapes(denoiser, ATTENTION), **config)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The layers that have a pair of matrices."""
        return tuple(self.config.sites)

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        weight = guidance_strength(inputs.guidance_scale) / (self.config.trained_scale - 1)
        return GuideOutput(
            residuals={
                name: partial(_add, self.pairs[key(name)], weight) for name in self.config.sites
            }
        )


def _add(
    pair: nn.Module, weight: torch.Tensor, module_input: torch.Tensor, module_output: torch.Tensor
) -> torch.Tensor:
    added: torch.Tensor = pair(module_input)
    return module_output + per_sample(weight, added) * added
