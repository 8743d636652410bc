"""ComfyUI's transformer of Stable Diffusion 3 and 3.5 (``mmdit.MMDiT``) as one more implementation
of the family ``joint-dit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT, modulate, split_qkv

from pilotfish.backbones import DenoiserCall, GuidedPass, Hooks
from pilotfish.backbones.joint_attention import JointBlock
from pilotfish.backbones.joint_dit import JointDiTBackbone
from pilotfish.backbones.tokens import patchify, to_map, to_tokens
from pilotfish.interface import GuideError, TextConditions

from .backbone import ComfyBackbone
from .mmdit_names import to_comfyui


class ComfyMMDiTBackbone(ComfyBackbone, JointDiTBackbone):
    """See the module.

    Args:
        denoiser: an ``MMDiT``.

    Raises:
        GuideError: it has layers that diffusers' transformer has not.
    """

    denoisers = (MMDiT,)
    repeats_text = False  # its tokens attend to each other

    def __init__(self, denoiser: Any) -> None:
        super().__init__(denoiser)
        if denoiser.context_processor is not None or denoiser.y_embedder is None:
            raise GuideError(
                "a transformer with a context processor or without pooled text takes no guide in "
                "ComfyUI"
            )

    def module(self, name: str) -> Any:
        return self.denoiser.get_submodule(to_comfyui(name))

    # -- what a guide may touch -----------------------------------------------------------

    def sites(self) -> dict[str, Any]:
        net, out = self.denoiser, self.module("proj_out")
        blocks = [f"transformer_blocks.{i}" for i in range(len(net.joint_blocks))]
        return {
            "text_dim": net.context_embedder.in_features,
            "pooled_dim": net.y_embedder.mlp[0].in_features,
            "attention": [[f"{name}.attn", net.num_heads] for name in blocks],
            "modulation": [*(f"{name}.norm1.linear" for name in blocks), "norm_out.linear"],
            "layers": [[name, net.hidden_size] for name in blocks],
            "head": {
                "module": "proj_out", "features": out.in_features, "channels": out.out_features
            },
        }  # fmt: skip

    # -- hooks ------------------------------------------------------------------------------

    def joint_block(self, name: str) -> JointBlock:
        return ComfyJointBlock(self.module(name))

    def embed(self, timestep: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        net = self.denoiser
        made: torch.Tensor = net.t_embedder.forward(timestep, dtype=pooled.dtype)
        return made + net.y_embedder.forward(pooled)

    def after_embedding(
        self, hooks: Hooks, begin: Callable[[GuidedPass, torch.Tensor], None]
    ) -> None:
        net = self.denoiser

        def timed(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            guided.scratch["timestep"] = args[0]

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            if guided.negative.pooled is None:
                raise GuideError("the negative conditioning has no pooled text")
            begin(guided, guided.scratch["timestep"])

        hooks.after(net.t_embedder, timed)
        hooks.after(net.y_embedder, embedded)

    def place_residuals(self, hooks: Hooks) -> None:
        def residual(name: str) -> Callable[..., Any]:
            def after(guided: GuidedPass, module: Any, args: Any, output: Any) -> Any:
                made = self.image_map(guided, name, output)
                # what enters a block first is its text
                entered = self.image_map(guided, name, args[0]) if name == self.head else made
                return self.with_image_map(
                    guided, name, output, guided.residual(name, entered, made)
                )

            return after

        for name in hooks.guide.target_modules:
            hooks.after(hooks.modules[name], residual(name))

    # -- calls --------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        if given.get("y") is None:
            raise GuideError("the conditioning has no pooled text")
        return super().read_call(given)

    def text(self, context: torch.Tensor, y: torch.Tensor | None) -> TextConditions:
        return TextConditions(context, y)

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"context": text.embeds, "y": text.pooled}

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        patch = self.denoiser.patch_size
        padded = pad_to_patch_size(latents, (patch, patch))
        return patchify(padded[:, : self.denoiser.out_channels], patch)

    def off_grid(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        height, width = latents.shape[-2:]
        made: torch.Tensor = self.denoiser.unpatchify(to_tokens(prediction), hw=(height, width))
        return made[..., :height, :width]

    def head_map(self, features: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        return to_map(features, latents.shape[-2:])

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        made: torch.Tensor = self.denoiser(
            latents, self.timestep(time), context=text.embeds, y=text.pooled
        )
        return made


class ComfyJointBlock(JointBlock):
    """ComfyUI's ``JointBlock``, whose queries, keys and values come out of one projection."""

    def __init__(self, block: Any) -> None:
        self.image, self.text = block.x_block, block.context_block
        self.heads, self.out = self.image.attn.num_heads, self.image.attn.proj
        self.text_ends = self.text.pre_only

    def capture_qkv(self, hooks: Hooks, name: str, *, of_text: bool) -> None:
        def heads_first(output: torch.Tensor) -> torch.Tensor:
            return output.transpose(1, 2)

        def value(output: torch.Tensor) -> torch.Tensor:
            return heads_first(split_qkv(output, self.image.attn.head_dim)[2])

        image, text = self.image.attn, self.text.attn
        hooks.keep(image.ln_q, (name, "q"), heads_first)
        hooks.keep(image.ln_k, (name, "k"), heads_first)
        hooks.keep(image.qkv, (name, "v"), value)
        if of_text:
            hooks.keep(text.ln_k, (name, "text k"), heads_first)
            hooks.keep(text.qkv, (name, "text v"), value)

    def read(
        self, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        block, attention = self.text, self.text.attn
        modulation = block.adaLN_modulation(embedding).chunk(2 if self.text_ends else 6, 1)
        shift, scale, *rest = modulation
        projected = attention.qkv.forward(modulate(block.norm1(stream), shift, scale))
        q, k, v = split_qkv(projected, attention.head_dim)
        q, k = attention.ln_q.forward(q), attention.ln_k.forward(k)
        return (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)), rest

    def follow(self, stream: torch.Tensor, answer: torch.Tensor, rest: Any) -> torch.Tensor:
        followed: torch.Tensor = self.text.post_attention(answer, stream, *rest)
        return followed
