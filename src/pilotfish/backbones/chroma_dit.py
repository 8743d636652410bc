"""ChromaTransformer2DModel: Chroma.

In the first blocks text and image are two streams of tokens, joined in every attention; in the
others, the single blocks, they are one sequence, the text first. Positions are given by rotation
(RoPE), the same for all tokens of the text. Scale and shift depend on time alone. Latents are
packed: tokens of 2 x 2 pixels, which are the channels of a map for the guide. Flow matching; the
timestep is sigma.

The pipeline gives its mask as numbers, and attention adds the product of two tokens' numbers to
their score. So a token with mask 0 still counts, and the negative prompt's stream is masked in the
same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ChromaPipeline, ChromaTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb

from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.doubling import TWO_LENGTHS
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joined_transformer import (
    JoinedTransformerBackbone,
    NegativeStream,
    NegativeText,
)
from pilotfish.backbones.joint_attention import clipped, text_heads
from pilotfish.backbones.pipeline import shift_by_size
from pilotfish.backbones.tokens import to_map, to_tokens
from pilotfish.interface import GuideError, TextConditions

IMAGES = "ip_adapter_image_embeds"


class ChromaDiTBackbone(JoinedTransformerBackbone):
    """See the module."""

    family = "chroma-dit"
    denoisers = (ChromaTransformer2DModel,)
    parameters = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids",
        "attention_mask", "joint_attention_kwargs",
    )  # fmt: skip
    packing = 2
    takes_sigma = True
    stacks = ("transformer_blocks", "single_transformer_blocks")
    embedders = ("context_embedder", "time_text_embed", "distilled_guidance_layer")

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        super().place(hooks)
        for block in self.denoiser.single_transformer_blocks:
            hooks.before(block, _masked, doubled=True)

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        super().place_text(hooks, stream)
        if stream.blocks:
            hooks.keep(self.denoiser.distilled_guidance_layer, "embedding")

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        stream, net, mask = self.embedded_negative(guided), self.denoiser, guided.negative.mask
        image = guided.scratch["image positions"]
        text = image.new_zeros(stream.shape[1], image.shape[1])
        positions = guided.cache.made_by(
            net.pos_embed, lambda: net.pos_embed.forward(torch.cat([text, image])), [net.pos_embed]
        )
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(stream.dtype)
        return NegativeText(stream, positions, mask)

    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        net = self.denoiser
        embedded = net.time_text_embed.forward(times.to(stream.dtype) * 1000)
        made: torch.Tensor = net.distilled_guidance_layer.forward(embedded)
        return made

    def _modulation(self, name: str) -> slice:
        """The rows of the denoiser's modulations that are those of a block's text."""
        net, (kind, number, _) = self.denoiser, name.split(".")
        if kind == "single_transformer_blocks":
            return slice(3 * int(number), 3 * int(number) + 3)
        first = 3 * len(net.single_transformer_blocks) + 6 * len(net.transformer_blocks)
        return slice(first + 6 * int(number), first + 6 * int(number) + 6)

    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        norm = block.norm if block.attn.pre_only else block.norm1_context
        x, *rest = norm.forward(stream, emb=embedding[:, self._modulation(name)])
        return text_heads(block.attn, x), (x, *rest)

    def rotated(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        made: torch.Tensor = apply_rotary_emb(x, positions, sequence_dim=1)
        return made

    def pairs(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return queries[:, None, :, None] * keys[:, None, None]

    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        x, *modulations = rest
        gate, *others = (r[:, None] for r in modulations)
        if block.attn.pre_only:  # text and image take the same layers
            hidden = torch.cat([text, block.act_mlp(block.proj_mlp.forward(x))], 2)
            return clipped(stream + gate * block.proj_out.forward(hidden))
        shift, scale, gate_ff = others
        stream = stream + gate * block.attn.to_add_out.forward(text)
        hidden = block.norm2_context.forward(stream) * (1 + scale) + shift
        return clipped(stream + gate_ff * block.ff_context.forward(hidden))

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        ids, mask = given["img_ids"], given.get("attention_mask")
        grid = self.made_of("grid", [ids], lambda: torch.Size((ids[-1, 1:].long() + 1).tolist()))
        embeds = given["encoder_hidden_states"]
        if mask is not None:
            whole = mask
            mask = self.made_of("mask", [whole], lambda: whole[:, : embeds.shape[1]])
        latents = to_map(given["hidden_states"], grid)
        return DenoiserCall(latents, given["timestep"], TextConditions(embeds, mask=mask))

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        _check_images(given)
        guided.scratch["image positions"] = given["img_ids"]
        guided.scratch["mask"] = given.get("attention_mask")
        return super().changed(guided, given)

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        _check_images(given)
        assert guided.call is not None
        if guided.negative.embeds.shape[1] != guided.call.text.embeds.shape[1]:
            raise GuideError(TWO_LENGTHS)
        changed = super().doubled(guided, given) | {"img_ids": given["img_ids"]}
        guided.scratch["mask"] = changed["attention_mask"]
        return changed

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        latents, mask = given["hidden_states"], text.mask
        return {
            "encoder_hidden_states": text.embeds,
            "txt_ids": latents.new_zeros(text.embeds.shape[1], 3),
            "attention_mask": (
                None if mask is None else _with_image(mask, latents.shape[1], latents.dtype)
            ),
        }

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        grid, tokens = latents.shape[-2:], to_tokens(latents)
        places = [torch.arange(side, device=latents.device) for side in (1, *grid)]
        made = self.denoiser(
            hidden_states=tokens, timestep=self.timestep(time),
            img_ids=torch.cartesian_prod(*places),
            **self.text_arguments(text, {"hidden_states": tokens}), return_dict=False,
        )[0]  # fmt: skip
        return to_map(made, grid)

    # -- the pipeline -----------------------------------------------------------------------

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        length = signature(ChromaPipeline.__call__).parameters["max_sequence_length"]
        return {**super().encoding(texts), "max_sequence_length": length.default}

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, _, mask, negative, _, negative_mask = encoded
        kept = None if negative is None else TextConditions(negative, mask=negative_mask)
        return TextConditions(prompt, mask=mask), kept

    def dynamic_shift(self, scheduler: Any) -> Callable[[int], float]:
        mu = shift_by_size(scheduler, self.latent_shape())
        return lambda steps: mu

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the packed latents of the pipeline's default, 1024 x 1024 pixels."""
        return int(self.denoiser.config.in_channels), 64, 64


def _masked(guided: GuidedPass, module: Any, args: Any, kwargs: Any) -> Any:
    """With gradient checkpointing the denoiser calls its single blocks without the mask."""
    mask = guided.scratch.get("mask")
    if mask is None or len(args) > 3 or kwargs.get("attention_mask") is not None:
        return None
    return args, {**kwargs, "attention_mask": mask}


def _with_image(mask: torch.Tensor, image: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, L + I) the mask of a text, and ones for the image, as the pipeline makes it."""
    return F.pad(mask if mask.dtype == torch.bool else mask.to(dtype), (0, image), value=1)


def _check_images(given: Mapping[str, Any]) -> None:
    if IMAGES in (given.get("joint_attention_kwargs") or {}):
        raise GuideError("a guide does not work with an IP-Adapter of Chroma; unload the adapter")
