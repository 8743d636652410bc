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

from pilotfish.backbones.base import plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.extrapolation import JointAttention, JointBlock, up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.transformer import TransformerBackbone
from pilotfish.interface import TextConditions


class JointDiTBackbone(TransformerBackbone):
    """See the module."""

    family = "joint-dit"
    denoisers = (SD3Transformer2DModel,)
    parameters: ClassVar[tuple[str, ...]] = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep",
    )  # fmt: skip

    def sites(self) -> dict[str, Any]:
        pooled = self.denoiser.time_text_embed.text_embedder.linear_1
        return {
            **super().sites(),
            "pooled_dim": plain(pooled).in_features,
            "modulation": [*(f"{name}.norm1.linear" for name in self.blocks()), "norm_out.linear"],
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

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        text = TextConditions(given["encoder_hidden_states"], given["pooled_projections"])
        return DenoiserCall(self.on_grid(given["hidden_states"]), given["timestep"], text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        # inpainting has a mask and an image beside the latents
        return super().on_grid(latents[:, : self.denoiser.out_channels])

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return super().text_arguments(text, given) | {"pooled_projections": text.pooled}

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        changed = super().doubled(guided, given)
        more, name = given.get("joint_attention_kwargs") or {}, "ip_adapter_image_embeds"
        if guided.negative_images is not None and name in more:
            images = torch.cat([*guided.negative_images, more[name]])
            changed["joint_attention_kwargs"] = {**more, name: images}
        return changed

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        return {**super().encoding(texts), "prompt_2": None, "prompt_3": None}

    def text_length(self, pipe: Any) -> dict[str, int]:
        t5 = getattr(pipe, "text_encoder_3", None)
        if t5 is None or t5.encoder.final_layer_norm.weight.any():
            return {}
        return {"max_sequence_length": 1}  # its tokens are zeros, all alike

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
