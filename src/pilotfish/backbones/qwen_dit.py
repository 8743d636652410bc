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
import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.extrapolation import joined_attention, split_heads, up_to_last
from pilotfish.backbones.hooks import Hooks
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


def latents_map(tokens: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """The map of the latents' tokens, which come first."""
    return to_map(tokens[:, : grid.numel()], grid)


class QwenDiTBackbone(Backbone):
    """See the module."""

    family = "qwen-dit"
    denoisers = (QwenImageTransformer2DModel,)
    joint_attention = ("whole",)
    parameters = (
        "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep",
        "img_shapes",
    )  # fmt: skip
    cfg_by_argument = True
    scale_argument = "true_cfg_scale"
    separate_negative = True
    control_from_prompt = True
    packing = 2
    video_vae = True
    text_is_projected = True
    guidance_rule = staticmethod(renormalised_by_token)

    def sites(self) -> dict[str, Any]:
        net = self.denoiser
        blocks = {f"transformer_blocks.{i}": b for i, b in enumerate(net.transformer_blocks)}
        return {
            "text_dim": plain(net.txt_in).in_features,
            "attention": [[f"{name}.attn", block.attn.heads] for name, block in blocks.items()],
            "modulation": [],
            "layers": [[name, net.inner_dim] for name in blocks],
            "head": {
                "module": "proj_out",
                "features": plain(net.proj_out).in_features,
                "channels": plain(net.proj_out).out_features,
            },
        }

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        net, names = self.denoiser, hooks.guide.extrapolated
        attention = up_to_last([name for name, _ in self.sites()["attention"]], names)

        def embedded(
            guided: GuidedPass, module: Any, args: Any, output: torch.Tensor
        ) -> torch.Tensor:
            """A norm comes before the layer, so the text is extrapolated after it."""
            given = guided.negative
            embeds = guided.cache.made_by(
                module, lambda: module.forward(net.txt_norm.forward(given.embeds)),
                (module, net.txt_norm),
            )  # fmt: skip
            negative = TextConditions(embeds, mask=given.mask)
            if attention:
                guided.scratch["stream", attention[0]] = embeds.expand(len(output), -1, -1)
            assert guided.call is not None
            mask = guided.call.text.mask
            if mask is None:  # texts have several lengths: tokens do not correspond
                mask = torch.ones(output.shape[:2], device=output.device)
            return guided.extrapolated_text(output, negative, mask=mask)

        def timed(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            # with zero_cond_t the second half is of time 0, for the tokens of images to edit
            guided.scratch["embedding"] = output.chunk(2)[0] if net.zero_cond_t else output

        hooks.after(net.txt_in, embedded)
        hooks.after(net.time_text_embed, timed)
        for i, name in enumerate(attention):
            following = attention[i + 1] if i + 1 < len(attention) else None
            self._place_attention(hooks, name, net.transformer_blocks[i], following)
        self.place_residuals(hooks)

    def _place_attention(self, hooks: Hooks, name: str, block: Any, following: str | None) -> None:
        """Extrapolate the attention of one block where the guide has a gain for it, and take the
        negative prompt's stream to the next block."""
        layer = block.attn

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            of_attention, of_ff = block.txt_mod.forward(guided.scratch["embedding"]).chunk(2, -1)
            x, gate = block._modulate(block.txt_norm1.forward(stream), of_attention)
            size, length = q.shape[-1], stream.shape[1]
            of_image, of_text = self._positions(guided, length)

            def heads(projection: Any) -> torch.Tensor:
                made: torch.Tensor = projection.forward(x).unflatten(-1, (-1, size))
                return made

            def turned(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
                text = apply_rotary_emb_qwen(text, of_text, use_real=False)
                image = apply_rotary_emb_qwen(image, of_image, use_real=False)
                return torch.cat([text, image], 1).transpose(1, 2)

            q_n = layer.norm_added_q.forward(heads(layer.add_q_proj))
            k_n = layer.norm_added_k.forward(heads(layer.add_k_proj))
            values = torch.cat([layer.add_v_proj.forward(x), v], 1)
            made = F.scaled_dot_product_attention(
                turned(q_n, q), turned(k_n, k), split_heads(values, layer.heads),
                attn_mask=self._joint_mask(guided, v),
            ).transpose(1, 2)  # fmt: skip
            if following is not None:
                out = layer.to_add_out.forward(made[:, :length].flatten(2))
                stream = stream + gate * out
                x, gate = block._modulate(block.txt_norm2.forward(stream), of_ff)
                stream = stream + gate * block.txt_mlp.forward(x)
                if stream.dtype == torch.float16:
                    stream = stream.clip(-65504, 65504)
                guided.scratch["stream", following] = stream
            if not guided.extrapolates(name):
                return None
            own = output.unflatten(-1, (layer.heads, -1))
            return guided.extrapolate(name, own, made[:, length:], by_head=True).flatten(2)

        joined_attention(hooks, name, layer, attend)

    def _positions(self, guided: GuidedPass, length: int) -> Any:
        """The rotations of the image's tokens and of so many of the text."""
        assert guided.call is not None
        shapes, device = guided.scratch["shapes"], guided.call.latents.device
        return self.denoiser.pos_embed.forward(shapes, max_txt_seq_len=length, device=device)

    @staticmethod
    def _joint_mask(guided: GuidedPass, image: torch.Tensor) -> torch.Tensor | None:
        """(N, 1, 1, L + I) which tokens of the negative prompt and the image count."""
        mask = guided.negative.mask
        if mask is None:
            return None
        mask = F.pad(mask.bool(), (0, image.shape[1]), value=True)
        return mask.expand(len(image), -1)[:, None, None]

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        tokens = output if isinstance(output, torch.Tensor) else output[1]  # (text, image)
        return self.prediction_map(guided, tokens)

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        tokens = to_tokens(made)
        before = output if isinstance(output, torch.Tensor) else output[1]
        if before.shape[1] > tokens.shape[1]:  # the rest are of images to edit
            tokens = torch.cat([tokens, before[:, tokens.shape[1] :]], 1)
        return tokens if isinstance(output, torch.Tensor) else (output[0], tokens)

    def prediction_map(self, guided: GuidedPass, prediction: torch.Tensor) -> torch.Tensor:
        assert guided.call is not None
        return latents_map(prediction, guided.call.latents.shape[-2:])

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        shapes = given["img_shapes"][0]
        # a ControlNet's pipeline gives one shape for each sample, others a list of them
        _, *grid = shapes[0] if isinstance(shapes, list) else shapes
        text = TextConditions(
            given["encoder_hidden_states"], mask=given.get("encoder_hidden_states_mask")
        )
        latents = latents_map(given["hidden_states"], torch.Size(grid))
        return DenoiserCall(latents, given["timestep"], text)

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        guided.scratch["shapes"] = given["img_shapes"]
        return super().changed(guided, given)

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        # the shapes of one sample serve all
        return super().doubled(guided, given) | {"img_shapes": given["img_shapes"][:1]}

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        mask = text.mask
        return {"encoder_hidden_states": text.embeds, "encoder_hidden_states_mask": mask}

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

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep.float()

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return time

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
