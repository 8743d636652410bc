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

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.extrapolation import joined_attention, split_heads, up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.tokens import to_map, to_tokens
from pilotfish.interface import GuideError, TextConditions

PIXELS = 8
"""Of one latent, each way, in the released model."""


class CogView4DiTBackbone(Backbone):
    """See the module."""

    family = "cogview4-dit"
    denoisers = (CogView4Transformer2DModel,)
    joint_attention = ("whole",)
    parameters = (
        "hidden_states", "encoder_hidden_states", "timestep", "original_size", "target_size",
        "crop_coords", "attention_kwargs", "return_dict", "attention_mask",
    )  # fmt: skip
    pads_to_longest = True
    negative_from_callback = True

    def sites(self) -> dict[str, Any]:
        net = self.denoiser
        blocks = {f"transformer_blocks.{i}": b for i, b in enumerate(net.transformer_blocks)}
        width = plain(net.proj_out).in_features
        return {
            "text_dim": plain(net.patch_embed.text_proj).in_features,
            "attention": [[f"{name}.attn1", block.attn1.heads] for name, block in blocks.items()],
            "modulation": [],
            "layers": [[name, width] for name in blocks],
            "head": {
                "module": "proj_out",
                "features": width,
                "channels": plain(net.proj_out).out_features,
            },
        }

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        net, names = self.denoiser, hooks.guide.extrapolated
        attention = up_to_last([name for name, _ in self.sites()["attention"]], names)

        def turned(guided: GuidedPass, module: Any, args: Any, output: Any) -> None:
            guided.scratch["positions"] = [part.to(args[0].device) for part in output]

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            """The prompts are embedded: begin the negative prompt's stream."""
            negative = guided.negative
            stream = guided.cache.made_by(module, lambda: module.forward(negative.embeds), [module])
            guided.scratch["stream", attention[0]] = stream.expand(len(output), -1, -1)

        def timed(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            guided.scratch["embedding"] = F.silu(output)

        if attention:
            hooks.after(net.rope, turned)
            hooks.after(net.patch_embed.text_proj, embedded)
            hooks.after(net.time_condition_embed, timed)
        for i, name in enumerate(attention):
            following = attention[i + 1] if i + 1 < len(attention) else None
            self._place_attention(hooks, name, net.transformer_blocks[i], following)
        self.place_residuals(hooks)

    def _place_attention(self, hooks: Hooks, name: str, block: Any, following: str | None) -> None:
        """Extrapolate the attention of one block where the guide has a gain for it, and take the
        negative prompt's stream to the next block."""
        layer = block.attn1

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            assert guided.call is not None
            length, image = stream.shape[1], guided.call.latents[0, 0].numel()
            modulation = block.norm1.linear.forward(guided.scratch["embedding"])[:, None]
            # of twelve, every second one is the text's
            shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(12, -1)[1::2]
            x = block.norm1.norm_context.forward(stream) * (1 + scale) + shift

            def heads(projection: Any) -> torch.Tensor:
                return split_heads(projection.forward(x), layer.heads)

            def joined(text: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
                return torch.cat([text, both[:, :, -image:]], 2)

            mask = guided.negative.mask
            made = attention_of_image_and_text(
                joined(layer.norm_q.forward(heads(layer.to_q)), q),
                joined(layer.norm_k.forward(heads(layer.to_k)), k),
                joined(heads(layer.to_v), split_heads(v, layer.heads)),
                guided.scratch["positions"], None if mask is None else mask.expand(len(x), -1),
            ).unflatten(-1, (layer.heads, -1))  # fmt: skip
            if following is not None:
                out = layer.to_out[0].forward(made[:, :length].flatten(2))
                stream = stream + gate * out
                hidden = block.norm2_context.forward(stream) * (1 + scale_ff) + shift_ff
                guided.scratch["stream", following] = stream + gate_ff * block.ff.forward(hidden)
            if not guided.extrapolates(name):
                return None
            own = output[:, -image:].unflatten(-1, (layer.heads, -1))
            changed = guided.extrapolate(name, own, made[:, length:], by_head=True)
            return torch.cat([output[:, :-image], changed.flatten(2)], 1)

        def copied(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> Any:
            return output.clone()  # the processor rotates it in place

        joined_attention(hooks, name, layer, attend)
        hooks.after(layer.norm_q, copied)
        hooks.after(layer.norm_k, copied)

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        tokens = output if isinstance(output, torch.Tensor) else output[0]  # (image, text)
        assert guided.call is not None
        return to_map(tokens, guided.call.latents.shape[-2:])

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        tokens = to_tokens(made)
        return tokens if isinstance(output, torch.Tensor) else (tokens, output[1])

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        text = TextConditions(given["encoder_hidden_states"], mask=given.get("attention_mask"))
        return DenoiserCall(self.on_grid(given["hidden_states"]), given["timestep"], text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.denoiser.config
        latents = latents[:, : config.out_channels]  # a control image lies beside them
        return F.pixel_unshuffle(latents, config.patch_size)

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        text, mask = given["encoder_hidden_states"], given.get("attention_mask")
        if mask is None:  # texts are padded on the left, so tokens do not correspond
            mask = torch.ones(text.shape[:2], device=text.device)
        text = guided.extrapolated_text(text, mask=mask)
        return {"encoder_hidden_states": guided.added_text(text)}

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        if text.mask is not None:
            self._use_masks()
        return {"encoder_hidden_states": text.embeds, "attention_mask": text.mask}

    def _use_masks(self) -> None:
        """Give every attention layer a processor that masks; without a mask it is diffusers'."""
        for block in self.denoiser.transformer_blocks:
            processor = block.attn1.processor
            if type(processor) is CogView4AttnProcessor:
                block.attn1.set_processor(MaskedProcessor())
            elif not isinstance(processor, MaskedProcessor):
                raise GuideError(
                    "prompt and negative prompt are of two lengths, which the attention processor "
                    f"{type(processor).__name__} cannot take in one batch: use refresh=0"
                )

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        if sizes is None:
            high, wide = (PIXELS * side for side in latents.shape[-2:])
            sizes = torch.tensor([[high, wide, 0, 0, high, wide]])
        original, crop, target = (
            sizes.to(latents.device, text.dtype).expand(len(latents), -1).chunk(3, 1)
        )
        made: torch.Tensor = self.denoiser(
            hidden_states=latents, timestep=self.timestep(time), original_size=original,
            target_size=target, crop_coords=crop, return_dict=False,
            **self.text_arguments(text, {}),
        )[0]  # fmt: skip
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
    """Attention in which masked tokens of the text do not count. See the module."""

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
