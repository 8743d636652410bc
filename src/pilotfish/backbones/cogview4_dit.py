"""CogView4Transformer2DModel: CogView4.

Text and image are two streams of tokens that share all weights but those of the modulation, which
depends on time and sizes. They are joined in every attention; positions are given by rotation
(RoPE), to the image alone. Flow matching. The pipeline shifts the noise levels but not the
timesteps, so the normalised time here is that before the shift.

The pipeline pads the texts of a batch to one length, a multiple of 16, and masks nothing. Where
prompt and negative prompt have two lengths, they need a mask to be in one batch. diffusers adds the
mask's 1 and 0 to the scores of attention, where a token with 0 still counts;
:class:`MaskedProcessor` leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import CogView4Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.extrapolation import split_heads
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joined_transformer import (
    JoinedTransformerBackbone,
    NegativeStream,
    NegativeText,
    over_rows,
)
from pilotfish.backbones.joint_attention import text_heads
from pilotfish.interface import GuideError, TextConditions

PIXELS = 8
"""Of one latent, each way, in the released model."""


class CogView4DiTBackbone(JoinedTransformerBackbone):
    """See the module."""

    family = "cogview4-dit"
    denoisers = (CogView4Transformer2DModel,)
    parameters = (
        "hidden_states", "encoder_hidden_states", "timestep", "original_size", "target_size",
        "crop_coords", "attention_kwargs", "return_dict", "attention_mask",
    )  # fmt: skip
    pads_to_longest = True
    negative_from_callback = True
    attention_layer = "attn1"
    text_layer = "patch_embed.text_proj"
    mask_argument = "attention_mask"
    image_output = 0
    embedders = ("patch_embed", "time_condition_embed")

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        # until the removal: gradient checkpointing runs blocks again in the backward pass
        self._use_masks()
        hooks.on_removal(self._restore_processors)
        super().place(hooks)

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        super().place_text(hooks, stream)
        if stream.blocks:
            hooks.keep(self.denoiser.time_condition_embed, "embedding", F.silu)

    def place_attention(self, hooks: Hooks, name: str, stream: NegativeStream) -> None:
        super().place_attention(hooks, name, stream)

        def copied(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> Any:
            return output.clone()  # the processor rotates it in place

        hooks.after(hooks.modules[name].norm_q, copied)
        hooks.after(hooks.modules[name].norm_k, copied)

    def image_of(self, guided: GuidedPass, tokens: torch.Tensor) -> torch.Tensor:
        # queries and keys come by heads, (N, heads, S, width)
        return super().image_of(guided, tokens.transpose(1, 2) if tokens.ndim == 4 else tokens)

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        assert guided.call is not None
        stream, rope, mask = (
            self.embedded_negative(guided), self.denoiser.rope, guided.negative.mask
        )  # fmt: skip
        sides = (self.patch * side for side in guided.call.latents.shape[-2:])
        latents = stream.new_empty(1, 1, *sides)  # its shape alone counts

        def positions() -> Any:
            cos, sin = (part.to(stream.device) for part in rope.forward(latents))
            length = stream.shape[1]  # the text is not rotated
            return F.pad(cos, (0, 0, length, 0), value=1), F.pad(sin, (0, 0, length, 0))

        made = guided.cache.made_by(rope, positions, [rope])
        return NegativeText(stream, made, None if mask is None else mask.bool())

    def stream_rows(self, guided: GuidedPass) -> int:
        assert guided.call is not None
        return len(guided.call.latents)  # sizes are embedded as well, and may differ

    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        sizes = (over_rows(size, len(times)) for size in guided.scratch["sizes"])
        made = self.denoiser.time_condition_embed.forward(times, *sizes, stream.dtype)
        return F.silu(made)

    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        modulation = block.norm1.linear.forward(embedding)[:, None]
        shift, scale, *rest = modulation.chunk(12, -1)[1::2]  # every second one is the text's
        x = block.norm1.norm_context.forward(stream) * (1 + scale) + shift
        return text_heads(block.attn1, x), rest

    def rotated(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        made: torch.Tensor = apply_rotary_emb(x, positions, use_real_unbind_dim=-2, sequence_dim=1)
        return made

    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        gate, shift, scale, gate_ff = rest
        stream = stream + gate * block.attn1.to_out[0].forward(text)
        hidden = block.norm2_context.forward(stream) * (1 + scale) + shift
        followed: torch.Tensor = stream + gate_ff * block.ff.forward(hidden)
        return followed

    # -- calls ------------------------------------------------------------------------------

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.denoiser.config
        latents = latents[:, : config.out_channels]  # a control image lies beside them
        return F.pixel_unshuffle(latents, config.patch_size)

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        text, mask = given["encoder_hidden_states"], given.get("attention_mask")
        if mask is None:  # texts are padded on the left, so tokens do not correspond
            mask = torch.ones(text.shape[:2], device=text.device)
        text = guided.extrapolated_text(text, mask=mask)
        names = ("original_size", "target_size", "crop_coords")
        guided.scratch["sizes"] = [given[name] for name in names]
        return {"encoder_hidden_states": guided.added_text(text)}

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        if text.mask is not None:
            self._use_masks()
            for processor in self._processors():
                if not isinstance(processor, MaskedProcessor):
                    raise GuideError(
                        "prompt and negative prompt are of two lengths, which the attention "
                        f"processor {type(processor).__name__} cannot take in one batch: use "
                        "refresh=0"
                    )
        return super().text_arguments(text, given)

    def _processors(self) -> list[Any]:
        return [block.attn1.processor for block in self.denoiser.transformer_blocks]

    def _use_masks(self) -> None:
        """Give every attention layer with diffusers' own processor one that masks, which does the
        same where there is no mask."""
        for block in self.denoiser.transformer_blocks:
            if type(block.attn1.processor) is CogView4AttnProcessor:
                block.attn1.set_processor(MaskedProcessor(block.attn1.processor))

    def _restore_processors(self) -> None:
        """Give every attention layer the processor back that it had before."""
        for block in self.denoiser.transformer_blocks:
            if isinstance(block.attn1.processor, MaskedProcessor):
                block.attn1.set_processor(block.attn1.processor.own)

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        if sizes is None:
            high, wide = (PIXELS * side for side in latents.shape[-2:])
            sizes = torch.tensor([[high, wide, 0, 0, high, wide]])
        original, crop, target = (
            sizes.to(latents.device, text.dtype).expand(len(latents), -1).chunk(3, 1)
        )
        guided = any(isinstance(p, MaskedProcessor) for p in self._processors())
        try:
            made: torch.Tensor = self.denoiser(
                hidden_states=latents, timestep=self.timestep(time), original_size=original,
                target_size=target, crop_coords=crop, return_dict=False,
                **self.text_arguments(text, {}),
            )[0]  # fmt: skip
        finally:
            if not guided:
                self._restore_processors()
        return made

    # -- the pipeline -----------------------------------------------------------------------

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, negative = encoded
        return TextConditions(prompt), None if negative is None else TextConditions(negative)

    def sizes(self, pipe: Any) -> torch.Tensor:
        """(1, 6) original size, crop and target size."""
        _, *sides = self.latent_shape()
        high, wide = (side * int(pipe.vae_scale_factor) for side in sides)
        return torch.tensor([[high, wide, 0, 0, high, wide]], dtype=torch.float32)

    def time_shift(self, pipe: Any) -> float:
        config = pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        _, height, width = self.latent_shape()
        names = ("base_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(
            height * width // self.denoiser.config.patch_size**2,
            *(
                config.get(name, usual)
                for name, usual in zip(names, (256, 0.25, 0.75), strict=True)
            ),
        )
        return mu if config.get("time_shift_type") == "linear" else math.exp(mu)

    def even_grid(self, steps: int) -> dict[str, list[float]]:
        return {"timesteps": (1000 * torch.linspace(1, 1 / steps, steps)).round().tolist()}


class MaskedProcessor(CogView4AttnProcessor):  # type: ignore[misc]
    """Attention in which masked tokens of the text do not count. See the module.

    Args:
        own: the layer's own processor, which a copied or pickled layer has in this one's place.
    """

    def __init__(self, own: CogView4AttnProcessor) -> None:
        super().__init__()
        self.own = own

    def __reduce__(self) -> Any:
        return type(self.own), ()

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None, image_rotary_emb: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(image, text) of the same, with a mask (N, L)."""
        if attention_mask is None:
            made: tuple[torch.Tensor, torch.Tensor] = super().__call__(
                attn, hidden_states, encoder_hidden_states, None, image_rotary_emb
            )
            return made
        both = torch.cat([encoder_hidden_states, hidden_states], 1)
        q, k, v = (
            split_heads(projection(both), attn.heads)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        )
        attended = attention_of_image_and_text(
            attn.norm_q(q), attn.norm_k(k), v, image_rotary_emb, attention_mask
        )
        length = encoder_hidden_states.shape[1]
        out = attn.to_out[1](attn.to_out[0](attended))
        return out[:, length:], out[:, :length]


def attention_of_image_and_text(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: Any, mask: torch.Tensor | None
) -> torch.Tensor:
    """(N, L + I, width) what tokens make of each other, the text's first.

    Args:
        q: (N, heads, L + I, width of a head), not rotated yet; so are k and v.
        positions: rotations of the image's tokens.
        mask: (N, L) which tokens of the text count.
    """
    image = len(positions[0])

    def turned(both: torch.Tensor) -> torch.Tensor:
        pixels = both[:, :, -image:]
        made = apply_rotary_emb(pixels, positions, use_real_unbind_dim=-2)
        return torch.cat([both[:, :, :-image], made], 2)

    counts = None if mask is None else F.pad(mask.bool(), (0, image), value=True)[:, None, None]
    made = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=counts)
    return made.transpose(1, 2).flatten(2)
