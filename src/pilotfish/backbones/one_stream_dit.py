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
import torch.nn.functional as F
from diffusers import Lumina2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joint_attention import attention, text_heads
from pilotfish.backbones.transformer import JoinedTransformerBackbone
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

    @property
    def last_layer(self) -> str:
        return "norm_out.linear_2"

    # -- hooks ------------------------------------------------------------------------------

    def place_text(self, hooks: Hooks, first: str | None) -> None:
        net = self.denoiser

        def embedded(guided: GuidedPass, module: Any, args: Any, output: Any) -> Any:
            """Time and the prompts are embedded: extrapolate these, and begin the negative
            prompt's stream."""
            embedding, text = output
            embedder, given = module.caption_embedder, guided.negative
            mask = _mask(given)
            parts = [embedder, *embedder]
            embeds = guided.cache.made_by(embedder, lambda: embedder.forward(given.embeds), parts)
            if first is not None:
                stream, positions = guided.cache.made_by(
                    net.context_refiner, lambda: self._refined(embeds, mask, args[0]),
                    [*parts, *net.context_refiner.modules()],
                )  # fmt: skip
                n = len(text)
                guided.scratch["stream", first] = stream.expand(n, -1, -1)
                guided.scratch["negative"] = (
                    embedding, positions.expand(n, -1, -1), mask.expand(n, -1)
                )  # fmt: skip
            return embedding, guided.extrapolated_text(text, TextConditions(embeds, mask=mask))

        hooks.after(net.time_caption_embed, embedded)

    def _refined(
        self, embeds: torch.Tensor, mask: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, L, d) the negative prompts as they enter the first block, and (N, L + I, k) the
        positions of theirs and of the image's tokens."""
        rope = self.denoiser.rope_embedder
        latents = latents[:1].expand(len(embeds), -1, -1, -1)
        _, of_text, of_image, *_ = rope.forward(latents, mask)
        for layer in self.denoiser.context_refiner:
            embeds = layer.forward(embeds, mask, of_text)
        return embeds, torch.cat([of_text, of_image], 1)

    def attend(
        self, guided: GuidedPass, name: str, block: Any, stream: torch.Tensor, q: torch.Tensor,
        k: torch.Tensor, v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:  # fmt: skip
        embedding, positions, mask = guided.scratch["negative"]
        x, *rest = block.norm1.forward(stream, embedding)
        layer, length, size = block.attn, stream.shape[1], q.shape[-1]

        def joined(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            both = torch.cat([text, image], 1)
            return both.repeat_interleave(layer.heads // both.shape[2], 2)

        def turned(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
            both = joined(text, image)
            made: torch.Tensor = apply_rotary_emb(both, positions, use_real=False)
            return made.to(both.dtype)

        q_n, k_n, v_n = text_heads(layer, x, size)
        counts = F.pad(mask.bool(), (0, q.shape[1]), value=True)
        made = attention(
            turned(q_n, q), turned(k_n, k), joined(v_n, v.unflatten(-1, (-1, size))),
            counts[:, None, None], layer.scale,
        )  # fmt: skip
        return made[:, :length], made[:, length:], rest

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
