"""CFG LoRA (LongLive-Plug, arXiv 2609.38154): guidance as a LoRA whose weight is the dial.

A LoRA is trained at one scale ``w0`` so that the base with it predicts what CFG does at w0.
Its weight turns the scale: ``W x + lambda B A x`` with ``w = 1 + lambda (w0 - 1)``. At one fixed
scale it can be merged into the weights and costs nothing. Here it stays unmerged, so that every
sample of a batch may have its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from baselines.sites import dotless, weights
from pilotfish.backbones import fingerprint
from pilotfish.guidance import guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import silent
from pilotfish.interface import GuideError, GuideInputs, GuideOutput

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class GuidanceLoRA(Guide):
    """See the module.

    Args:
        denoiser: the fingerprint of the denoiser.
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
        denoiser: dict[str, Any],
        sites: dict[str, list[int]],
        rank: int = 4,
        trained_scale: float = 4.0,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        timesteps: Sequence[int] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.1.0",
    ) -> None:
        super().__init__()
        if trained_scale <= 1:
            raise GuideError(f"trained_scale must be above 1, not {trained_scale}")

        self.pairs = nn.ModuleDict(
            {
                dotless(name): nn.Sequential(
                    nn.Linear(entering, rank, bias=False),
                    silent(nn.Linear(rank, leaving, bias=False)),
                )
                for name, (leaving, entering) in sites.items()
            }
        )

    @classmethod
    def for_denoiser(cls, unet: UNet2DConditionModel, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet, on the projections of all its attentions."""
        return cls(fingerprint(unet, prediction_type), weights(unet, ATTENTION), **config)

    @property
    def touches(self) -> tuple[str, ...]:
        """Every layer that has a pair of matrices."""
        return tuple(self.config.sites)

    def forward(self, inputs: GuideInputs) -> GuideOutput:
        dial = guidance_strength(inputs.guidance_scale) / (self.config.trained_scale - 1)
        return GuideOutput(
            modules={
                name: partial(self._add, self.pairs[dotless(name)], dial)
                for name in self.config.sites
            }
        )

    @staticmethod
    def _add(
        pair: nn.Module, dial: torch.Tensor, entered: torch.Tensor, made: torch.Tensor
    ) -> torch.Tensor:
        added: torch.Tensor = pair(entered)
        return per_sample(dial, added) * added
