"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5.

Text is a stream of tokens beside the image's, joined with it in every attention, and pooled text
enters the modulation. Flow matching; timesteps are 1000 sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import nn

from pilotfish.backbones.base import plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.extrapolation import up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joint_attention import JointAttention, JointBlock
from pilotfish.backbones.transformer import KnownValues, TransformerBackbone
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
        names, guide = hooks.guide.extrapolated, hooks.guide
        attention = up_to_last([name for name, _ in self.sites()["attention"]], names)
        blocks = {name: self.joint_block(name.removesuffix(".attn")) for name in attention}
        cached = guide.negative_stream == "cached"
        image_tokens = guide.image_tokens if guide.joint_attention == "sampled" else None
        joint = JointAttention(blocks, image_tokens=image_tokens, cached=cached)
        modulation = {name: hooks.modules[name] for name in names if name not in attention}
        known = _Known(self, modulation, joint if cached and attention else None)

        def begin(guided: GuidedPass, timestep: torch.Tensor) -> None:
            """Time is embedded: begin the negative prompt's stream."""
            negative, n = guided.negative, len(timestep)
            embedding = guided.scratch.get("negative embedding")
            if embedding is not None and cached:
                return  # the stream is known as well
            if embedding is None:
                rows = len(negative) if guided.cache.one_time else n
                assert negative.pooled is not None
                embedding = self.embed(timestep[:rows], negative.pooled.expand(rows, -1))
                guided.scratch["negative embedding"] = embedding
                guided.scratch["negative temb"] = F.silu(embedding)
            if attention:
                embedder = self.denoiser.context_embedder
                tokens = guided.cache.made_by(
                    embedder, lambda: embedder.forward(negative.embeds), [embedder]
                )
                rows = max(len(embedding), len(tokens)) if cached else n
                joint.begin(guided, tokens.expand(rows, -1, -1))

        if names:
            hooks.before_graph(self.denoiser, known.take)
            self.after_embedding(hooks, begin)
        for name in attention:
            joint.place(hooks, name)
        for name, layer in modulation.items():
            hooks.after(layer, _modulation(name))
        self.place_residuals(hooks)

    def joint_block(self, name: str) -> JointBlock:
        """The block of that name."""
        return JointBlock(self.denoiser.get_submodule(name))

    def embedders(self) -> Iterator[nn.Module]:
        """All modules that embed time and text."""
        yield from self.denoiser.time_text_embed.modules()
        yield from self.denoiser.context_embedder.modules()

    def embed(self, timestep: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The embedding (N, d) of timesteps (N,) and pooled text (N, D)."""
        made: torch.Tensor = self.denoiser.time_text_embed.forward(timestep, pooled)
        return made

    def after_embedding(
        self, hooks: Hooks, begin: Callable[[GuidedPass, torch.Tensor], None]
    ) -> None:
        """Call ``begin(guided, timestep)`` in each guided pass when time and the prompt's pooled
        text are embedded, with the timesteps (N,)."""

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            begin(guided, args[0])

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


class _Known(KnownValues):
    """The embedding of time and the negative prompts' pooled text, what each modulation layer makes
    of it, and keys and values of the stream.

    Args:
        modulation: the modulation layers that are extrapolated, by name.
        joint: the attention whose stream is cached, where it is.
    """

    backbone: JointDiTBackbone

    def __init__(
        self, backbone: JointDiTBackbone, modulation: Mapping[str, Any],
        joint: JointAttention | None,
    ) -> None:  # fmt: skip
        super().__init__(backbone)
        self.modulation, self.joint = modulation, joint

    def make(self, guided: GuidedPass, times: torch.Tensor) -> list[torch.Tensor]:
        backbone, negative = self.backbone, guided.negative
        steps = len(times) // len(negative)
        assert negative.pooled is not None
        embedding = backbone.embed(times, negative.pooled.repeat(steps, 1))
        temb = F.silu(embedding)
        made = [embedding, *(layer.forward(temb) for layer in self.modulation.values())]
        if self.joint is not None:
            tokens = backbone.denoiser.context_embedder.forward(negative.embeds)
            made += self.joint.at_all_times(tokens.repeat(steps, 1, 1), embedding)
        return made

    def keep(self, guided: GuidedPass, known: Sequence[torch.Tensor]) -> None:
        embedding, *made = known
        guided.scratch["negative embedding"] = embedding
        guided.scratch |= zip(self.modulation, made, strict=False)
        if self.joint is not None:
            self.joint.begin_known(guided, made[len(self.modulation) :])

    def modules(self) -> Iterator[nn.Module]:
        yield from self.backbone.embedders()
        for layer in self.modulation.values():
            yield from layer.modules()
        for block in self.joint.blocks.values() if self.joint is not None else ():
            yield from block.text_modules()

    def size(self, guided: GuidedPass) -> int:
        embeds = guided.negative.embeds
        width, values = self.backbone.denoiser.inner_dim, 1
        if self.joint is not None:
            values += 2 * len(self.joint.blocks) * embeds.shape[1]
        made = width * values + sum(layer.out_features for layer in self.modulation.values())
        return int(len(embeds) * made * embeds.element_size())


def _modulation(name: str) -> Callable[..., Any]:
    """Extrapolate what a linear layer makes of the embedding of time and pooled text."""

    def after(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> Any:
        if not guided.extrapolates(name):
            return None
        negative = guided.scratch.get(name)
        if negative is None:
            negative = module.forward(guided.scratch["negative temb"])
        return guided.extrapolate(name, output, negative)

    return after
