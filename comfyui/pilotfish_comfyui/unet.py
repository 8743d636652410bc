"""ComfyUI's UNet (``openaimodel.UNetModel``) as one more implementation of the family ``unet``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from pilotfish.backbones import GuidedPass, Hooks
from pilotfish.backbones.extrapolation import cross_attention
from pilotfish.interface import GuideError, TextConditions

from .backbone import ComfyBackbone
from .unet_names import Layout, to_comfyui

EMBEDDED_SIZE = 256
"""Features of each number among the size conditions of SDXL."""


class AttentionView:
    """ComfyUI's ``CrossAttention`` with the attributes of diffusers' ``Attention``."""

    norm_q = norm_k = norm_cross = None

    def __init__(self, layer: Any) -> None:
        self.heads, self.scale = layer.heads, layer.dim_head**-0.5
        self.to_q, self.to_k, self.to_v, self.to_out = (
            layer.to_q, layer.to_k, layer.to_v, layer.to_out
        )  # fmt: skip


class ComfyUNetBackbone(ComfyBackbone):
    """See the module.

    Args:
        denoiser: a ``UNetModel``.
        sizes: how many numbers follow the pooled text in its vector ``y``: 6 for SDXL, 5 for its
            refiner.
    """

    family = "unet"
    denoisers = (UNetModel,)
    repeats_text = True

    def __init__(self, denoiser: Any, sizes: int = 6) -> None:
        super().__init__(denoiser)
        self.layout, self.size_features = Layout.of_comfyui(denoiser), sizes * EMBEDDED_SIZE
        self.names = self.layout.names()

    def module(self, name: str) -> Any:
        return self.denoiser.get_submodule(to_comfyui(name, self.names))

    # -- what a guide may touch -----------------------------------------------------------

    def sites(self) -> dict[str, Any]:
        out = self.module("conv_out")
        attention = self._cross_attentions()
        if not attention:
            raise GuideError("this UNet has no cross-attention after its encoder")
        return {
            "text_dim": self.module(attention[0]).to_k.in_features,
            "attention": [[name, self.module(name).heads] for name in attention],
            "modulation": self._modulated(),
            "layers": [
                [name, self._width(name)]
                for name in self.names
                if name.startswith("up_blocks") and "upsamplers" not in name
            ],
            "head": {
                "module": "conv_out", "features": out.in_channels, "channels": out.out_channels
            },
            "encoder": self._skips(),
            "middle": self._width(f"down_blocks.{len(self.layout.down) - 1}.resnets.0"),
        }  # fmt: skip

    def _cross_attentions(self) -> list[str]:
        """Of mid block and decoder, in running order."""
        return [
            f"{name}.transformer_blocks.{k}.attn2"
            for name in self.names
            if name.startswith(("mid_block.attentions", "up_blocks")) and ".attentions." in name
            for k, block in enumerate(self.module(name).transformer_blocks)
            if block.attn2 is not None
        ]

    def _modulated(self) -> list[str]:
        """The residual layers, where pooled text enters the embedding of the timestep."""
        if self.denoiser.num_classes != "sequential":
            return []
        return [name for name in self.names if ".resnets." in name]

    def _width(self, name: str) -> int:
        """Channels of the residual layer ``name``, or of the one before an attention layer."""
        return int(self.module(name.replace("attentions", "resnets")).out_channels)

    def _skips(self) -> list[list[int]]:
        """[channels, level] of each skip feature."""
        found = [[int(self.module("conv_in").out_channels), 0]]
        for level, block in enumerate(self.layout.down):
            widths = [self._width(f"down_blocks.{level}.resnets.{j}") for j in range(len(block))]
            found += [[width, level] for width in widths]
            if level < len(self.layout.down) - 1:
                found.append([widths[-1], level + 1])
        return found

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        embedded = set(self._modulated())

        def negative_states(guided: GuidedPass) -> tuple[torch.Tensor, None]:
            return guided.negative.embeds, None

        for name in hooks.guide.extrapolated:
            layer = hooks.modules[name]
            if name in embedded:
                self._place_modulation(hooks, name, layer)
            else:
                cross_attention(hooks, name, AttentionView(layer), negative_states)
        if embedded & set(hooks.guide.extrapolated):
            hooks.after(self.denoiser.label_emb, self._pool_negative)
        self.place_residuals(hooks)

    def _pool_negative(
        self, guided: GuidedPass, pooling: Any, args: Any, made: torch.Tensor
    ) -> None:
        """The denoiser embedded pooled text and sizes, (N, E): note by how much that of the
        negative prompt differs, at the same sizes."""
        pooled, given = guided.negative.pooled, args[0]
        if pooled is None:
            raise GuideError("the negative conditioning has no pooled text")
        sizes = given[:, pooled.shape[1] :]
        negative = torch.cat([pooled.to(given).expand(len(given), -1), sizes], 1)
        guided.scratch["pooled difference"] = pooling.forward(negative) - made

    def _place_modulation(self, hooks: Hooks, name: str, layer: Any) -> None:
        def embedding(guided: GuidedPass, module: Any, args: Any, kwargs: Any) -> None:
            guided.scratch["emb"] = args[1]  # all residual layers are given the same

        def projected(
            guided: GuidedPass, module: nn.Sequential, args: Any, output: torch.Tensor
        ) -> torch.Tensor | None:
            if not guided.extrapolates(name):
                return None
            negative = guided.scratch["emb"] + guided.scratch["pooled difference"]
            return guided.extrapolate(name, output, module.forward(negative))

        hooks.before(layer, embedding)
        hooks.after(layer.emb_layers, projected)

    # -- calls --------------------------------------------------------------------------------

    def text(self, context: torch.Tensor, y: torch.Tensor | None) -> TextConditions:
        """The prompts in the arguments of a call: (N, L, D), and the beginning of (N, E)."""
        return TextConditions(context, None if y is None else y[:, : -self.size_features])

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        found = {"context": text.embeds}
        if text.pooled is not None:
            found["y"] = torch.cat([text.pooled, given["y"][:, -self.size_features :]], 1)
        return found

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        # inpainting has further channels, a mask and an image
        return latents[:, : self.denoiser.out_channels]

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        y = None if text.pooled is None else torch.cat([text.pooled, sizes], 1)
        made: torch.Tensor = self.denoiser(latents, self.timestep(time), context=text.embeds, y=y)
        return made

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return (time * self.num_train_timesteps).round()
