"""QwenImageTransformer2DModel: Qwen-Image, with or without images to edit, and with a ControlNet.

Text and image are two streams of tokens, joined in every attention, with positions by
rotation (RoPE) and a mask. Latents are packed: tokens of 2 x 2 pixels, which are the channels of a
map for the guide. Flow matching; the timestep is sigma. The pipeline makes a second pass only where
a negative prompt is given, and brings CFG back to the norm of the conditional prediction, token by
token. Where an image is edited, its tokens follow those of the latents, and both prompts are
encoded with it; the guide adds to the latents' tokens alone. A ControlNet runs once, on the prompt,
for both passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joined_transformer import (
    JoinedTransformerBackbone,
    NegativeStream,
    NegativeText,
)
from pilotfish.backbones.joint_attention import clipped, text_heads
from pilotfish.backbones.pipeline import shift_by_size
from pilotfish.backbones.tokens import to_map, to_tokens
from pilotfish.guidance import renormalised_guidance
from pilotfish.interface import TextConditions


def renormalised_by_token(
    unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: torch.Tensor | float
) -> torch.Tensor:
    """:func:`~pilotfish.guidance.renormalised_guidance` along the channels of tokens (N, I, C) or
    of their map (N, C, h, w)."""
    dim = -1 if conditional.ndim == 3 else 1
    return renormalised_guidance(unconditional, conditional, guidance_scale, dim)


class QwenDiTBackbone(JoinedTransformerBackbone):
    """See the module."""

    family = "qwen-dit"
    denoisers = (QwenImageTransformer2DModel,)
    parameters = (
        "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep",
        "img_shapes",
    )  # fmt: skip
    cfg_by_argument = True
    scale_argument = "true_cfg_scale"
    separate_negative = True
    control_from_prompt = True
    packing = 2
    takes_sigma = True
    text_layer = "txt_in"
    mask_argument = "encoder_hidden_states_mask"
    video_vae = True
    text_is_projected = True
    embedders = ("txt_norm", "txt_in", "time_text_embed")
    guidance_rule = staticmethod(renormalised_by_token)

    # -- hooks ------------------------------------------------------------------------------

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        net = self.denoiser

        def embedded(
            guided: GuidedPass, module: Any, args: Any, output: torch.Tensor
        ) -> torch.Tensor:
            """A norm comes before the layer, so the text is extrapolated after it."""
            stream.begin(guided)
            embeds = self.embedded_negative(guided)
            negative = TextConditions(embeds, mask=guided.negative.mask)
            assert guided.call is not None
            mask = guided.call.text.mask
            if mask is None:  # texts have several lengths: tokens do not correspond
                mask = torch.ones(output.shape[:2], device=output.device)
            return guided.extrapolated_text(output, negative, mask=mask)

        hooks.after(net.txt_in, embedded)
        # with zero_cond_t the second half is of time 0, for the tokens of images to edit
        hooks.keep(
            net.time_text_embed, "embedding",
            (lambda output: output.chunk(2)[0]) if net.zero_cond_t else (lambda output: output),
        )  # fmt: skip

    def embed_negative(self, guided: GuidedPass) -> torch.Tensor:
        layer, norm = self.denoiser.txt_in, self.denoiser.txt_norm
        return guided.cache.made_by(
            layer, lambda: layer.forward(norm.forward(guided.negative.embeds)), (layer, norm)
        )

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        stream, mask = self.embedded_negative(guided), guided.negative.mask
        of_image, of_text = self.denoiser.pos_embed.forward(
            guided.scratch["shapes"], max_txt_seq_len=stream.shape[1], device=stream.device
        )
        positions = torch.cat([of_text, of_image])
        return NegativeText(stream, positions, None if mask is None else mask.bool())

    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        made: torch.Tensor = self.denoiser.time_text_embed.forward(times.to(stream.dtype), stream)
        return made

    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        of_attention, of_ff = block.txt_mod.forward(embedding).chunk(2, -1)
        x, gate = block._modulate(block.txt_norm1.forward(stream), of_attention)
        return text_heads(block.attn, x), (gate, of_ff)

    def rotated(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        made: torch.Tensor = apply_rotary_emb_qwen(x, positions, use_real=False)
        return made

    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        gate, of_ff = rest
        stream = stream + gate * block.attn.to_add_out.forward(text)
        x, gate = block._modulate(block.txt_norm2.forward(stream), of_ff)
        return clipped(stream + gate * block.txt_mlp.forward(x))

    def image_start(self, guided: GuidedPass, tokens: torch.Tensor) -> int:
        return 0  # text and image are two streams everywhere

    def image_of(self, guided: GuidedPass, tokens: torch.Tensor) -> torch.Tensor:
        return tokens  # those of images to edit follow the latents'

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        shapes = given["img_shapes"][0]
        # a ControlNet's pipeline gives one shape for each sample, others a list of them
        _, *grid = shapes[0] if isinstance(shapes, list) else shapes
        size = torch.Size(grid)
        text = TextConditions(given["encoder_hidden_states"], mask=given.get(self.mask_argument))
        latents = to_map(given["hidden_states"][:, : size.numel()], size)
        return DenoiserCall(latents, given["timestep"], text)

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        guided.scratch["shapes"] = given["img_shapes"]
        return super().changed(guided, given)

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        # the shapes of one sample serve all
        return super().doubled(guided, given) | {"img_shapes": given["img_shapes"][:1]}

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        grid = latents.shape[-2:]
        made = self.denoiser(
            hidden_states=to_tokens(latents), timestep=self.timestep(time),
            encoder_hidden_states=text.embeds, encoder_hidden_states_mask=text.mask,
            img_shapes=[[(1, *grid)]] * len(latents), return_dict=False,
        )[0]  # fmt: skip
        return to_map(made, grid)

    # -- the pipeline -----------------------------------------------------------------------

    def refusal(self, pipe: Any) -> str | None:
        config = self.denoiser.config
        if config.guidance_embeds:
            return "its denoiser takes in the guidance scale and needs no second pass"
        if config.use_additional_t_cond or config.use_layer3d_rope:
            return "its denoiser generates several layers of an image together"
        return None

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        length = signature(QwenImagePipeline.__call__).parameters["max_sequence_length"]
        return {**super().encoding(texts), "max_sequence_length": length.default}

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        embeds, mask = encoded
        return TextConditions(embeds, mask=mask), None

    def dynamic_shift(self, scheduler: Any) -> Callable[[int], float]:
        mu = shift_by_size(scheduler, self.latent_shape())
        return lambda steps: mu

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the packed latents of the pipeline's default, 1024 x 1024 pixels."""
        return int(self.denoiser.config.in_channels), 64, 64
