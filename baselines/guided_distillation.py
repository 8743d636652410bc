"""Guided distillation (Meng et al., arXiv 2210.03142): the whole denoiser learns.

The denoiser itself is trained, and w enters beside the timestep. It is no plug: it has the size
of the denoiser. Here it is kept as a change of every linear and convolutional layer,
``(W + dW) x + b + db``, added to the layer as it runs, so that it can be put on a fine-tune like
all others; norms and the embedding of time stay as they are. Merged into the weights it would
cost one plain pass; unmerged it costs two. Nothing makes it vanish at w = 1; there the pipeline
does not ask it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from baselines.sites import dotless, weights
from pilotfish.backbones import Backbone
from pilotfish.guidance import fourier_features
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import zero_module
from pilotfish.interface import GuideInputs, GuideOutput, ResidualFunction

FEATURES = 64
TIME = "time_embedding"


class WholeDenoiser(Guide, guide_type="guided-distillation"):
    """See the module.

    Args:
        signature: of the denoiser.
        sites: its layers, name -> shape (:func:`baselines.sites.weights`).
        time_width: width of its time embedding, to which the embedding of w is added.
        guidance_scale_range: the (low, high) of w in training.
    """

    learning_rate = 3e-4

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        sites: dict[str, list[int]],
        time_width: int,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
        super().__init__()
        self.changes, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for name, shape in sites.items():
            self.changes[dotless(name)] = nn.Parameter(torch.zeros(shape[:4]))
            self.biases[dotless(name)] = nn.Parameter(torch.zeros(shape[0]))
        self.scale = nn.Sequential(
            nn.Linear(FEATURES, time_width),
            nn.SiLU(),
            zero_module(nn.Linear(time_width, time_width)),
        )

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet: it changes nothing yet."""
        width = denoiser.time_embedding.linear_2.out_features
        # what the time embedding itself is made of stays, and w is added to what it makes
        sites = {k: v for k, v in weights(denoiser).items() if not k.startswith(TIME)}
        return cls(Backbone.of(denoiser).signature(prediction_type), sites, width, **config)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Every layer with weights, and the time embedding."""
        return (*self.config.sites, TIME)

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        seen = fourier_features(inputs.guidance_scale, FEATURES, longest=32.0)
        embedded = self.scale(seen.to(inputs.text.dtype))
        residuals: dict[str, ResidualFunction] = {
            name: partial(self._add, dotless(name), tuple(shape[4:]))
            for name, shape in self.config.sites.items()
        }
        return GuideOutput(residuals=residuals | {TIME: lambda entered, made: made + embedded})

    def _add(
        self, key: str, geometry: tuple[int, ...], entered: torch.Tensor, made: torch.Tensor
    ) -> torch.Tensor:
        change, bias = self.changes[key], self.biases[key]
        if not geometry:
            return made + F.linear(entered, change, bias)
        stride, padding = geometry
        return made + F.conv2d(entered, change, bias, stride, padding)
