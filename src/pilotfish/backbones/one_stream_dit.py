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

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.extrapolation import joined_attention, up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.tokens import patchify, to_map, to_tokens
from pilotfish.guidance import renormalised_guidance
from pilotfish.interface import TextConditions


class OneStreamDiTBackbone(Backbone):
    """See the module."""

    family = "one-stream-dit"
    denoisers = (Lumina2Transformer2DModel,)
    joint_attention = ("whole",)
    parameters = (
        "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask",
    )  # fmt: skip
    sign = -1
    guidance_rule = staticmethod(partial(renormalised_guidance, dim=-1))
    other_negatives = True
    text_is_projected = True

    def sites(self) -> dict[str, Any]:
        net = self.denoiser
        names = [f"layers.{i}" for i in range(len(net.layers))]
        last, width = plain(net.norm_out.linear_2), net.config.hidden_size
        return {
            "text_dim": plain(net.time_caption_embed.caption_embedder[1]).in_features,
            "attention": [
                [f"{name}.attn", block.attn.heads]
                for name, block in zip(names, net.layers, strict=True)
            ],
            "modulation": [],
            "layers": [[name, width] for name in names],
            "head": {
                "module": "norm_out.linear_2",
                "features": width,
                "channels": last.out_features,
            },
        }

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        net, names = self.denoiser, hooks.guide.extrapolated
        attention = up_to_last([name for name, _ in self.sites()["attention"]], names)

        def embedded(guided: GuidedPass, module: Any, args: Any, output: Any) -> Any:
            """Time and the prompts are embedded: extrapolate these, and begin the negative
            prompt's stream."""
            embedding, text = output
            embedder, given = module.caption_embedder, guided.negative
            mask = _mask(given)
            parts = [embedder, *embedder]
            embeds = guided.cache.made_by(embedder, lambda: embedder.forward(given.embeds), parts)
            if attention:
                stream, positions = guided.cache.made_by(
                    net.context_refiner, lambda: self._refined(embeds, mask, args[0]),
                    [*parts, *net.context_refiner.modules()],
                )  # fmt: skip
                n = len(text)
                guided.scratch["stream", attention[0]] = stream.expand(n, -1, -1)
                guided.scratch["negative"] = (
                    embedding, positions.expand(n, -1, -1), mask.expand(n, -1)
                )  # fmt: skip
            return embedding, guided.extrapolated_text(text, TextConditions(embeds, mask=mask))

        hooks.after(net.time_caption_embed, embedded)
        for i, name in enumerate(attention):
            following = attention[i + 1] if i + 1 < len(attention) else None
            self._place_attention(hooks, name, net.layers[i], following)
        self.place_residuals(hooks)

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

    def _place_attention(
        self, hooks: Hooks, name: str, block: Any, following: str | None
    ) -> None:  # fmt: skip
        """Extrapolate the attention of one block where the guide has a gain for it, and take the
        negative prompt's stream to the next block."""
        layer = block.attn

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            embedding, positions, mask = guided.scratch["negative"]
            rows, length = self._rows(guided, q), stream.shape[1]
            x, gate, scale_ff, gate_ff = block.norm1.forward(stream, embedding)
            size = q.shape[-1]

            def joined(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
                """(N, heads, L + I, width) of the negative prompt's tokens and the image's."""
                image = _rows_of(image.flatten(2), rows).unflatten(-1, (-1, size))
                both = torch.cat([text, image], 1)
                repeats = layer.heads // both.shape[2]
                return both.repeat_interleave(repeats, 2).transpose(1, 2)

            def turned(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
                both = joined(text, image).transpose(1, 2)
                made = apply_rotary_emb(both, positions, use_real=False)
                return made.to(both.dtype).transpose(1, 2)

            def heads(projection: Any) -> torch.Tensor:
                made: torch.Tensor = projection.forward(x).unflatten(-1, (-1, size))
                return made

            q_n = layer.norm_q.forward(heads(layer.to_q))
            k_n = layer.norm_k.forward(heads(layer.to_k))
            counts = F.pad(mask.bool(), (0, rows.shape[1]), value=True)
            made = F.scaled_dot_product_attention(
                turned(q_n, q), turned(k_n, k),
                joined(heads(layer.to_v), v.unflatten(-1, (-1, size))),
                attn_mask=counts[:, None, None], scale=layer.scale,
            ).transpose(1, 2)  # fmt: skip
            if following is not None:
                out = layer.to_out[0].forward(made[:, :length].flatten(2))
                stream = stream + gate[:, None].tanh() * block.norm2.forward(out)
                hidden = block.ffn_norm1.forward(stream) * (1 + scale_ff[:, None])
                hidden = block.ffn_norm2.forward(block.feed_forward.forward(hidden))
                guided.scratch["stream", following] = stream + gate_ff[:, None].tanh() * hidden
            if not guided.extrapolates(name):
                return None
            own = _rows_of(output, rows).unflatten(-1, (layer.heads, -1))
            changed = guided.extrapolate(name, own, made[:, length:], by_head=True)
            return _with_rows(output, rows, changed.flatten(2))

        joined_attention(hooks, name, layer, attend)

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        assert guided.call is not None
        tokens = _rows_of(output, self._rows(guided, output))
        return to_map(tokens, guided.call.latents.shape[-2:])

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        return _with_rows(output, self._rows(guided, output), to_tokens(made))

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

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        text = TextConditions(given["encoder_hidden_states"], mask=given["encoder_attention_mask"])
        return DenoiserCall(self.on_grid(given["hidden_states"]), given["timestep"], text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return patchify(latents, self.denoiser.config.patch_size)

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": text.embeds, "encoder_attention_mask": _mask(text)}

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        made: torch.Tensor = self.denoiser(
            hidden_states=latents, timestep=self.timestep(time), encoder_hidden_states=text.embeds,
            encoder_attention_mask=_mask(text), return_dict=False,
        )[0]  # fmt: skip
        return self.sign * made

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return 1 - timestep.float()

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return 1 - time

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, mask, negative, negative_mask = encoded
        kept = None if negative is None else TextConditions(negative, mask=negative_mask)
        return TextConditions(prompt, mask=mask), kept


def _mask(text: TextConditions) -> torch.Tensor:
    """(N, L) 1 for tokens that count."""
    mask = torch.ones_like(text.embeds[..., 0]) if text.mask is None else text.mask
    return mask.long()  # the denoiser counts them to place the image


def _rows_of(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of (N, S, d) the rows (N, I)."""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[-1]))


def _with_rows(tokens: torch.Tensor, rows: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """(N, S, d) with other rows (N, I)."""
    places = rows[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.scatter(1, places, made.to(tokens.dtype))
