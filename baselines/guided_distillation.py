"""Guided distillation (Meng et al., arXiv 2210.03142): the whole denoiser is trained.

The denoiser's weights are trained, and w is embedded like the timestep. The guide holds a change
of every linear and convolutional layer, ``(W + dW) x + b + db``, so it is as large as the
denoiser; it is added to the layer's output, so that it attaches to a fine-tune like other guides.
Norms and the timestep embedding's own layers stay as they are. Merged into the weights it would
cost one plain pass; unmerged it costs two. It is not zero at w = 1 by construction; the pipeline
does not call a guide there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from baselines.modules import key, weight_shapes
from pilotfish.backbones import Backbone
from pilotfish.guidance import fourier_features
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import zero_module
from pilotfish.interface import GuideInputs, GuideOutput, ResidualFunction

FEATURES = 64
TIME = "time_embedding"


class GuidedDistillation(Guide, guide_type="guided-distillation"):
    """See the module.

    Args:
        signature: of the denoiser.
        sites: weight shapes of its layers, by name (:func:`baselines.modules.weight_shapes`).
        time_width: width of its timestep embedding, to which the embedding of w is added.
        guidance_scale_range: the (low, high) of w in training.
    """

    title = "Guided Distillation"
    learning_rate = 3e-4

    @register_to_config
    def __init__(
        self, signature: dict[str, Any], sites: dict[str, list[int]], time_width: int,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None, trained_on: dict[str, str] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:  # fmt: skip
        super().__init__()
        self.changes, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for name, shape in sites.items():
            self.changes[key(name)] = nn.Parameter(torch.zeros(shape[:4]))
            self.biases[key(name)] = nn.Parameter(torch.zeros(shape[0]))
        self.scale = nn.Sequential(
            nn.Linear(FEATURES, time_width), nn.SiLU(),
            zero_module(nn.Linear(time_width, time_width)),
        )  # fmt: skip

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet."""
        signature = Backbone.of(denoiser).signature(prediction_type)
        width = denoiser.time_embedding.linear_2.out_features
        shapes = weight_shapes(denoiser)
        sites = {name: shape for name, shape in shapes.items() if not name.startswith(TIME)}
        return cls(signature, sites, width, **config)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Every layer with weights, and the timestep embedding."""
        return (*self.config.sites, TIME)

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        features = fourier_features(inputs.guidance_scale, FEATURES, longest=32.0)
        scale = self.scale(features.to(inputs.text.dtype))
        residuals: dict[str, ResidualFunction] = {
            name: partial(self._add, key(name), tuple(shape[4:]))
            for name, shape in self.config.sites.items()
        }
        return GuideOutput(residuals=residuals | {TIME: lambda _, output: output + scale})

    def _add(
        self, name: str, geometry: tuple[int, ...], module_input: torch.Tensor,
        module_output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        change, bias = self.changes[name], self.biases[name]
        if not geometry:
            return module_output + F.linear(module_input, change, bias)
        stride, padding = geometry
        return module_output + F.conv2d(module_input, change, bias, stride, padding)
