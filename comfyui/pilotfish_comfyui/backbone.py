"""What ComfyUI's denoisers have in common as implementations of Pilotfish's families.

The signature of each is that of diffusers' denoiser with the same layers, so one guide fits both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from pilotfish.backbones import Backbone, DenoiserCall, GuidedPass
from pilotfish.interface import GuideError, TextConditions


class ComfyBackbone(Backbone):
    """See the module. Its names of modules are those of diffusers."""

    component = "diffusion_model"
    parameters: ClassVar[tuple[str, ...]] = (
        "x", "timesteps", "context", "y", "control", "transformer_options",
    )  # fmt: skip
    repeats_text: ClassVar[bool]
    """Whether a prompt that is repeated stays the same for the denoiser."""

    @abstractmethod
    def module(self, name: str) -> Any:
        """A module by its name in diffusers."""

    @property
    def head(self) -> str:
        """The name of the last module."""
        return str(self.sites()["head"]["module"])

    def find_modules(self, named: Sequence[str], modules: dict[str, Any]) -> dict[str, Any]:
        try:
            return {name: self.module(name) for name in named}
        except (KeyError, AttributeError) as error:
            raise GuideError(
                f"this {type(self.denoiser).__name__} lacks a layer to which the guide adds: "
                f"{error}"
            ) from error

    def _end(self, guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
        if guided.active:
            guided.end(output)

    # -- calls --------------------------------------------------------------------------------

    @abstractmethod
    def text(self, context: torch.Tensor, y: torch.Tensor | None) -> TextConditions:
        """The prompts in the arguments of a call."""

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        text = self.text(given["context"], given.get("y"))
        return DenoiserCall(self.on_grid(given["x"]), given["timesteps"], text)

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"context": guided.added_text(guided.extrapolated_text(given["context"]))}

    def head_map(self, features: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """What enters the last module as a map (N, features, h, w).

        Args:
            latents: (N, C, h, w) on the grid.
        """
        return features

    def off_grid(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """A prediction on the grid as the denoiser returns it, for latents (N, C, H, W): the
        inverse of :meth:`on_grid`."""
        return prediction

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        # ComfyUI's two conditionings
        prompt, negative = (
            TextConditions(embeds, more.get("pooled_output")) for ((embeds, more), *_) in encoded
        )
        return prompt, negative
