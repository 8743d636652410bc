"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5.

Text is a stream of tokens beside the image's, joined with it in every attention, and pooled text
enters the modulation. Flow matching; timesteps are 1000 sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.doubling import without_mask
from pilotfish.backbones.extrapolation import JointAttention, JointBlock, up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.tokens import patchify, to_map, to_tokens
from pilotfish.interface import TextConditions


class JointDiTBackbone(Backbone):
    """See the module."""

    family = "joint-dit"
    denoisers = (SD3Transformer2DModel,)
    parameters: ClassVar[tuple[str, ...]] = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep",
    )  # fmt: skip

    def sites(self) -> dict[str, Any]:
        net = self.denoiser
        blocks = {f"transformer_blocks.{i}": b for i, b in enumerate(net.transformer_blocks)}
        return {
            "text_dim": plain(net.context_embedder).in_features,
            "pooled_dim": plain(net.time_text_embed.text_embedder.linear_1).in_features,
            "attention": [[f"{name}.attn", block.attn.heads] for name, block in blocks.items()],
            "modulation": [*(f"{name}.norm1.linear" for name in blocks), "norm_out.linear"],
            "layers": [[name, net.inner_dim] for name in blocks],
            "head": {
                "module": "proj_out",
                "features": plain(net.proj_out).in_features,
                "channels": plain(net.proj_out).out_features,
            },
        }

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        names = hooks.guide.extrapolated
        attention = up_to_last([name for name, _ in self.sites()["attention"]], names)
        joint = JointAttention(attention, text_alone=hooks.guide.joint_attention == "text")

        def begin(guided: GuidedPass, embedding: torch.Tensor) -> None:
            """Time is embedded with the negative prompt's pooled text: begin that prompt's
            stream."""
            guided.scratch["negative temb"] = F.silu(embedding)
            if attention:
                embedder = self.denoiser.context_embedder
                stream = guided.cache.made_by(
                    embedder, lambda: embedder.forward(guided.negative.embeds), [embedder]
                )
                joint.begin(guided, stream.expand(len(embedding), -1, -1), embedding)

        if names:
            self.after_embedding(hooks, begin)
        for name in attention:
            joint.place(hooks, name, self.joint_block(name.removesuffix(".attn")))
        for name in names:
            if name not in attention:
                hooks.after(hooks.modules[name], _modulation(name))
        self.place_residuals(hooks)

    def joint_block(self, name: str) -> JointBlock:
        """The block of that name."""
        return JointBlock(self.denoiser.get_submodule(name))

    def after_embedding(
        self, hooks: Hooks, begin: Callable[[GuidedPass, torch.Tensor], None]
    ) -> None:
        """Call ``begin(guided, embedding)`` in each guided pass, when time and the prompt's pooled
        text are embedded, with the embedding (N, d) that the negative prompt's text leads to."""

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            timestep, given = args
            pooled = guided.negative.pooled
            assert pooled is not None
            begin(guided, module.forward(timestep, pooled.to(given.dtype).expand(len(output), -1)))

        hooks.after(self.denoiser.time_text_embed, embedded)

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        tokens = output if isinstance(output, torch.Tensor) else output[1]  # (text, image)
        assert guided.call is not None
        return to_map(tokens, guided.call.latents.shape[-2:])

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        tokens = to_tokens(made)
        return tokens if isinstance(output, torch.Tensor) else (output[0], tokens)

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        text = TextConditions(given["encoder_hidden_states"], given["pooled_projections"])
        return DenoiserCall(self.on_grid(given["hidden_states"]), given["timestep"], text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        # inpainting has a mask and an image beside the latents
        latents = latents[:, : self.denoiser.out_channels]
        return patchify(latents, self.denoiser.config.patch_size)

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "encoder_hidden_states": without_mask(text), "pooled_projections": text.pooled,
        }  # fmt: skip

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        changed = super().doubled(guided, given)
        more, name = given.get("joint_attention_kwargs") or {}, "ip_adapter_image_embeds"
        if guided.negative_images is not None and name in more:
            images = torch.cat([*guided.negative_images, more[name]])
            changed["joint_attention_kwargs"] = {**more, name: images}
        return changed

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        made: torch.Tensor = self.denoiser(
            hidden_states=latents, timestep=self.timestep(time), encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled, return_dict=False,
        )[0]  # fmt: skip
        return made

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        return {**super().encoding(texts), "prompt_2": None, "prompt_3": None}

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, negative, pooled, negative_pooled = encoded
        kept = None if negative is None else TextConditions(negative, negative_pooled)
        return TextConditions(prompt, pooled), kept


def _modulation(name: str) -> Callable[..., Any]:
    """Extrapolate what a linear layer makes of the embedding of time and pooled text."""

    def after(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> Any:
        if not guided.extrapolates(name):
            return None
        negative = module.forward(guided.scratch["negative temb"])
        return guided.extrapolate(name, output, negative)

    return after
