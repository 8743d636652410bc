"""Lumina2Transformer2DModel: Lumina Image 2.0.

Text and image are one sequence of tokens, the text first, with positions by rotation (RoPE).
Prompts have several lengths, so the image's rows begin at another place for each sample. The
denoiser predicts the negative of the flow's velocity at the time 1 - sigma, and the pipeline
brings CFG back to the norm of the conditional prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joined_transformer import (
    JoinedTransformerBackbone,
    NegativeStream,
    NegativeText,
    over_rows,
)
from pilotfish.backbones.joint_attention import attention, text_heads
from pilotfish.guidance import renormalised_guidance
from pilotfish.interface import TextConditions


class OneStreamDiTBackbone(JoinedTransformerBackbone):
    """See the module."""

    family = "one-stream-dit"
    denoisers = (Lumina2Transformer2DModel,)
    parameters = (
        "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask",
    )  # fmt: skip
    sign = -1
    takes_sigma = True
    stacks = ("layers",)
    text_layer = "time_caption_embed.caption_embedder.1"
    mask_argument = "encoder_attention_mask"
    guidance_rule = staticmethod(partial(renormalised_guidance, dim=-1))
    other_negatives = True
    text_is_projected = True
    embedders = ("time_caption_embed", "context_refiner")

    @property
    def last_layer(self) -> str:
        return "norm_out.linear_2"

    # -- hooks ------------------------------------------------------------------------------

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        def embedded(guided: GuidedPass, module: Any, args: Any, output: Any) -> Any:
            """Time and the prompts are embedded: begin the negative prompts' stream, and
            extrapolate these."""
            guided.scratch["embedding"], text = output
            stream.begin(guided)
            negative = TextConditions(self.embedded_negative(guided), mask=_mask(guided.negative))
            return output[0], guided.extrapolated_text(text, negative)

        hooks.after(self.denoiser.time_caption_embed, embedded)

    def embed_negative(self, guided: GuidedPass) -> torch.Tensor:
        embedder = self.denoiser.time_caption_embed.caption_embedder
        return guided.cache.made_by(
            embedder, lambda: embedder.forward(guided.negative.embeds), [embedder, *embedder]
        )

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        net = self.denoiser
        embedder = net.time_caption_embed.caption_embedder
        return guided.cache.made_by(
            net.context_refiner, lambda: self._refined(guided, self.embedded_negative(guided)),
            [embedder, *embedder, *net.context_refiner.modules()],
        )  # fmt: skip

    def _refined(self, guided: GuidedPass, embeds: torch.Tensor) -> NegativeText:
        """The negative prompts as they enter the first block, of their embeddings (N, L, d)."""
        assert guided.call is not None
        net, mask = self.denoiser, _mask(guided.negative)
        sides = (self.patch * side for side in guided.call.latents.shape[-2:])
        latents = embeds.new_empty(len(embeds), 1, *sides)  # its shape alone counts
        _, of_text, of_image, *_ = net.rope_embedder.forward(latents, mask)
        for layer in net.context_refiner:
            embeds = layer.forward(embeds, mask, of_text)
        return NegativeText(embeds, torch.cat([of_text, of_image], 1), mask.bool())

    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        embedder = self.denoiser.time_caption_embed
        projected = embedder.time_proj.forward(times).type_as(stream)
        made: torch.Tensor = embedder.timestep_embedder.forward(projected)
        return made

    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        x, *rest = block.norm1.forward(stream, embedding)
        return text_heads(block.attn, x), rest

    def rotated(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        made: torch.Tensor = apply_rotary_emb(x, over_rows(positions, len(x)), use_real=False)
        return made.to(x.dtype)

    def attention(
        self, block: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        return attention(q, k, v, mask, block.attn.scale)

    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        gate, scale, gate_ff = (r[:, None] for r in rest)
        out = block.norm2.forward(block.attn.to_out[0].forward(text))
        stream = stream + gate.tanh() * out
        hidden = block.ffn_norm1.forward(stream) * (1 + scale)
        hidden = block.ffn_norm2.forward(block.feed_forward.forward(hidden))
        followed: torch.Tensor = stream + gate_ff.tanh() * hidden
        return followed

    def image_of(self, guided: GuidedPass, tokens: torch.Tensor) -> torch.Tensor:
        flat = tokens.flatten(2)
        places = self._rows(guided, tokens)[..., None].expand(-1, -1, flat.shape[-1])
        return flat.gather(1, places).unflatten(2, tokens.shape[2:])

    def with_image(
        self, guided: GuidedPass, tokens: torch.Tensor, made: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        places = self._rows(guided, tokens)[..., None].expand(-1, -1, tokens.shape[-1])
        return tokens.scatter(1, places, made.to(tokens.dtype))

    def _rows(self, guided: GuidedPass, tokens: torch.Tensor) -> torch.Tensor:
        """(N, I) places of the image's tokens in a sequence of the pass."""
        n = len(tokens)
        if ("rows", n) not in guided.scratch:
            assert guided.call is not None
            text = guided.call.text
            counts = _mask(text).sum(1)
            if n > len(text):  # negative prompts first
                counts = torch.cat([_mask(guided.negative).sum(1).expand(len(text)), counts])
            pixels = guided.call.latents[0, 0].numel()
            places = torch.arange(pixels, device=counts.device)
            guided.scratch["rows", n] = counts.long()[:, None] + places
        rows: torch.Tensor = guided.scratch["rows", n]
        return rows

    # -- calls ------------------------------------------------------------------------------

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": text.embeds, "encoder_attention_mask": _mask(text)}

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, mask, negative, negative_mask = encoded
        kept = None if negative is None else TextConditions(negative, mask=negative_mask)
        return TextConditions(prompt, mask=mask), kept


def _mask(text: TextConditions) -> torch.Tensor:
    """(N, L) 1 for tokens that count."""
    mask = torch.ones_like(text.embeds[..., 0]) if text.mask is None else text.mask
    return mask.long()  # the denoiser counts them to place the image
