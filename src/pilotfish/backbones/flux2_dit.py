"""Flux2Transformer2DModel: FLUX.2 klein, the base models, which are not distilled.

Text and image are two streams of tokens in the first blocks, and one sequence with the text first
in the others, whose attention and feed-forward layers share their projections. Positions are by
rotation (RoPE), and there is no mask. Latents are packed: tokens of 2 x 2 pixels, which are the
channels of a map for the guide; those of reference images follow them. Flow matching; the timestep
is sigma. The pipeline takes the negative prompt as embeddings, and encodes the empty text where it
is given none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joined_transformer import (
    JoinedTransformerBackbone,
    NegativeStream,
    NegativeText,
)
from pilotfish.backbones.joint_attention import clipped, head_width, text_heads
from pilotfish.backbones.tokens import to_map, to_tokens
from pilotfish.interface import TextConditions


class Flux2DiTBackbone(JoinedTransformerBackbone):
    """See the module."""

    family = "flux2-dit"
    denoisers = (Flux2Transformer2DModel,)
    parameters = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance",
    )  # fmt: skip
    separate_negative = True
    default_negative = ""
    packing = 2
    takes_sigma = True
    stacks = ("transformer_blocks", "single_transformer_blocks")
    embedders = (
        "context_embedder", "time_guidance_embed", "double_stream_modulation_txt",
        "single_stream_modulation",
    )  # fmt: skip

    # -- hooks ------------------------------------------------------------------------------

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        super().place_text(hooks, stream)

        def modulated(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            of_two = guided.scratch["of two streams"]
            guided.scratch["embedding"] = torch.cat([of_two, output], -1)

        if stream.blocks:
            hooks.keep(self.denoiser.double_stream_modulation_txt, "of two streams")
            hooks.after(self.denoiser.single_stream_modulation, modulated)

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        stream, net = self.embedded_negative(guided), self.denoiser
        ids = torch.cat([text_ids(stream.shape[1], stream.device), guided.scratch["image ids"]])
        return NegativeText(stream, net.pos_embed.forward(ids))

    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        net = self.denoiser
        embedding = net.time_guidance_embed.forward(times.to(stream.dtype) * 1000, None)
        modulations = net.double_stream_modulation_txt, net.single_stream_modulation
        return torch.cat([module.forward(embedding) for module in modulations], -1)

    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        layer, width = block.attn, stream.shape[-1]
        of_two, of_one = embedding.tensor_split([6 * width], -1)
        if not name.startswith("single"):
            (shift, scale, *rest), of_ff = Flux2Modulation.split(of_two, 2)
            x = block.norm1_context.forward(stream) * (1 + scale) + shift
            return text_heads(layer, x), [*rest, *of_ff]
        ((shift, scale, *rest),) = Flux2Modulation.split(of_one, 1)
        x, width = block.norm.forward(stream) * (1 + scale) + shift, layer.inner_dim
        *parts, ff = layer.to_qkv_mlp_proj.forward(x).tensor_split(
            [width, 2 * width, 3 * width], -1
        )
        q, k, v = (part.unflatten(-1, (-1, head_width(layer))) for part in parts)
        return (layer.norm_q.forward(q), layer.norm_k.forward(k), v), [*rest, ff]

    def rotated(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        made: torch.Tensor = apply_rotary_emb(x, positions, sequence_dim=1)
        return made

    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        layer, (gate, *others) = block.attn, rest
        if len(others) == 1:  # text and image take the same layers
            of_ff = layer.mlp_act_fn.forward(others[0])
            return clipped(stream + gate * layer.to_out.forward(torch.cat([text, of_ff], -1)))
        shift, scale, gate_ff = others
        stream = stream + gate * layer.to_add_out.forward(text)
        x = block.norm2_context.forward(stream) * (1 + scale) + shift
        return clipped(stream + gate_ff * block.ff_context.forward(x))

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        tokens = output if isinstance(output, torch.Tensor) else output[1]
        return super().with_image_map(guided, name, output, made.to(tokens.dtype))

    def image_tokens(self, guided: GuidedPass) -> int:
        tokens: int = guided.scratch["tokens"]
        return tokens

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        own = _ids(given) * (_ids(given)[:, :1] == 0)  # those of reference images have other times
        height, width = (int(last) + 1 for last in own.amax(0)[1:3].tolist())
        tokens = given["hidden_states"][:, : height * width]
        latents = to_map(tokens, torch.Size([height, width]))
        return DenoiserCall(
            latents, given["timestep"], TextConditions(given["encoder_hidden_states"])
        )

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        ids = guided.scratch["image ids"] = _ids(given)
        guided.scratch["tokens"] = len(ids)
        return super().changed(guided, given)

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        guided.scratch["tokens"] = len(_ids(given))
        return super().doubled(guided, given)

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        grid, device = latents.shape[-2:], latents.device
        made = self.denoiser(
            hidden_states=to_tokens(latents), timestep=self.timestep(time),
            encoder_hidden_states=text.embeds, txt_ids=text_ids(text.embeds.shape[1], device),
            img_ids=image_ids(grid, device), return_dict=False,
        )[0]  # fmt: skip
        return to_map(made, grid)

    # -- the pipeline -----------------------------------------------------------------------

    def refusal(self, pipe: Any) -> str | None:
        if self.denoiser.config.guidance_embeds:
            return "its denoiser takes in the guidance scale and needs no second pass"
        if pipe is not None and pipe.config.get("is_distilled"):
            return "its denoiser is distilled (is_distilled) and needs no second pass"
        return None

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        embeds, _ = encoded
        return TextConditions(embeds), None

    def needs_image(self, pipe: Any) -> bool:
        # reference images are an option
        return "strength" in signature(type(pipe).__call__).parameters

    def negative_arguments(self, pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
        embeds, _ = pipe.encode_prompt(**self.encoding(texts))
        return {"negative_prompt_embeds": embeds}

    def dynamic_shift(self, scheduler: Any) -> Callable[[int], float]:
        _, height, width = self.latent_shape()
        return partial(compute_empirical_mu, height * width)

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the packed latents of the pipeline's default, 1024 x 1024 pixels."""
        return int(self.denoiser.config.in_channels), 64, 64

    def final_latents(
        self, latents: torch.Tensor, pipe: Any, call: Mapping[str, Any]
    ) -> torch.Tensor:  # fmt: skip
        return self.from_vae(pipe.vae, latents.float())  # a call leaves them as the VAE's

    def vae_statistics(self, vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
        mean, variance = (
            x.to(like).view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, 1 / (variance + vae.config.batch_norm_eps).sqrt()


def text_ids(length: int, device: torch.device) -> torch.Tensor:
    """(L, 4) the positions of a text's tokens: time, row, column, place in the text."""
    ids = torch.zeros(length, 4, dtype=torch.long, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids


def image_ids(grid: torch.Size, device: torch.device) -> torch.Tensor:
    """(h w, 4) those of an image's tokens."""
    ids = torch.zeros(*grid, 4, dtype=torch.long, device=device)
    for axis, side in enumerate(grid):
        ids[..., 1 + axis] = torch.arange(side, device=device).unflatten(0, (-1, *[1] * (1 - axis)))
    return ids.flatten(0, 1)


def _ids(given: Mapping[str, Any]) -> torch.Tensor:
    """(tokens, 4) the positions of the image's tokens in a call."""
    ids: torch.Tensor = given["img_ids"]
    return ids[0] if ids.ndim == 3 else ids
