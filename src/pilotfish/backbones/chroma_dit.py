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

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.doubling import TWO_LENGTHS
from pilotfish.backbones.extrapolation import joined_attention, up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.pipeline import shift_by_size
from pilotfish.backbones.tokens import to_map, to_tokens
from pilotfish.interface import GuideError, TextConditions

IMAGES = "ip_adapter_image_embeds"


class ChromaDiTBackbone(Backbone):
    """See the module."""

    family = "chroma-dit"
    denoisers = (ChromaTransformer2DModel,)
    joint_attention = ("whole",)
    parameters = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids",
        "attention_mask", "joint_attention_kwargs",
    )  # fmt: skip
    packing = 2

    def _blocks(self) -> dict[str, Any]:
        """All blocks by name, in running order."""
        net, lists = self.denoiser, ("transformer_blocks", "single_transformer_blocks")
        return {f"{name}.{i}": b for name in lists for i, b in enumerate(getattr(net, name))}

    def sites(self) -> dict[str, Any]:
        net, blocks = self.denoiser, self._blocks()
        return {
            "text_dim": plain(net.context_embedder).in_features,
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

        def timed(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            guided.scratch["modulations"] = output

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            """The prompts are embedded: begin the negative prompt's stream."""
            negative = guided.negative
            stream = guided.cache.made_by(module, lambda: module.forward(negative.embeds), [module])
            guided.scratch["stream", attention[0]] = stream.expand(len(output), -1, -1)
            guided.scratch["positions"] = guided.cache.made_by(
                net.pos_embed, lambda: self._positions(guided), [net.pos_embed]
            )

        if attention:
            hooks.after(net.distilled_guidance_layer, timed)
            hooks.after(net.context_embedder, embedded)
        for i, name in enumerate(attention):
            following = attention[i + 1] if i + 1 < len(attention) else None
            block = hooks.modules[name.removesuffix(".attn")]
            self._place_attention(hooks, name, block, following)
        for block in net.single_transformer_blocks:
            hooks.before(block, _masked, doubled=True)
        self.place_residuals(hooks)

    def _positions(self, guided: GuidedPass) -> Any:
        """The rotations of the negative prompt's tokens and of the image's."""
        image = guided.scratch["image positions"]
        text = image.new_zeros(guided.negative.embeds.shape[1], image.shape[1])
        return self.denoiser.pos_embed.forward(torch.cat([text, image]))

    def _modulation(self, name: str) -> slice:
        """The rows of the denoiser's modulations that are those of a block's text."""
        net, (kind, number, _) = self.denoiser, name.split(".")
        if kind == "single_transformer_blocks":
            return slice(3 * int(number), 3 * int(number) + 3)
        first = 3 * len(net.single_transformer_blocks) + 6 * len(net.transformer_blocks)
        return slice(first + 6 * int(number), first + 6 * int(number) + 6)

    def _place_attention(self, hooks: Hooks, name: str, block: Any, following: str | None) -> None:
        """Extrapolate the attention of one block where the guide has a gain for it, and take the
        negative prompt's stream to the next block."""
        layer, rows = block.attn, self._modulation(name)
        single = layer.pre_only  # text and image take the same layers

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            assert guided.call is not None
            modulation = guided.scratch["modulations"][:, rows]
            norm = block.norm if single else block.norm1_context
            x, *rest = norm.forward(stream, emb=modulation)
            length, image = stream.shape[1], guided.call.latents[0, 0].numel()

            def heads(tokens: torch.Tensor) -> torch.Tensor:
                return tokens.unflatten(-1, (layer.heads, -1))

            def joined(text: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
                return torch.cat([text, both[:, -image:]], 1)

            def turned(both: torch.Tensor) -> torch.Tensor:
                positions = guided.scratch["positions"]
                made: Any = apply_rotary_emb(both, positions, sequence_dim=1)
                by_head: torch.Tensor = made.transpose(1, 2)
                return by_head

            if single:
                projections = layer.to_q, layer.to_k, layer.to_v
                norm_q, norm_k = layer.norm_q, layer.norm_k
            else:
                projections = layer.add_q_proj, layer.add_k_proj, layer.add_v_proj
                norm_q, norm_k = layer.norm_added_q, layer.norm_added_k
            q_n, k_n, v_n = (heads(projection.forward(x)) for projection in projections)
            q_n, k_n = norm_q.forward(q_n), norm_k.forward(k_n)
            made = F.scaled_dot_product_attention(
                turned(joined(q_n, q)), turned(joined(k_n, k)),
                joined(v_n, heads(v)).transpose(1, 2), attn_mask=self._pairs(guided, image, v),
            ).transpose(1, 2)  # fmt: skip
            if following is not None:
                text = made[:, :length].flatten(2)
                stream = self._after_attention(block, stream, x, text, rest)
                if stream.dtype == torch.float16:
                    stream = stream.clip(-65504, 65504)
                guided.scratch["stream", following] = stream
            if not guided.extrapolates(name):
                return None
            own = heads(output[:, -image:])
            changed = guided.extrapolate(name, own, made[:, length:], by_head=True).flatten(2)
            return torch.cat([output[:, :-image], changed], 1) if single else changed

        joined_attention(hooks, name, layer, attend)

    @staticmethod
    def _after_attention(
        block: Any, stream: torch.Tensor, x: torch.Tensor, text: torch.Tensor,
        rest: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """The rest of a block, for the stream of a text.

        Args:
            x: what entered its attention.
            text: what came out, before the projection.
            rest: the other modulations of the block's first norm.
        """
        gate, *others = (r[:, None] for r in rest)
        if block.attn.pre_only:
            hidden = torch.cat([text, block.act_mlp(block.proj_mlp.forward(x))], 2)
            single: torch.Tensor = stream + gate * block.proj_out.forward(hidden)
            return single
        shift, scale, gate_ff = others
        stream = stream + gate * block.attn.to_add_out.forward(text)
        hidden = block.norm2_context.forward(stream) * (1 + scale) + shift
        double: torch.Tensor = stream + gate_ff * block.ff_context.forward(hidden)
        return double

    @staticmethod
    def _pairs(guided: GuidedPass, image: int, like: torch.Tensor) -> torch.Tensor | None:
        """(N, 1, L + I, L + I) the mask of pairs of tokens, of negative prompt and image."""
        if guided.negative.mask is None:
            return None
        mask = _with_image(guided.negative.mask, image, like.dtype)
        return (mask[:, None, None] * mask[:, None, :, None]).expand(len(like), -1, -1, -1)

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        assert guided.call is not None
        grid = guided.call.latents.shape[-2:]
        tokens = output if isinstance(output, torch.Tensor) else output[1]  # (text, image)
        return to_map(tokens[:, -grid.numel() :], grid)

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        tokens = to_tokens(made)
        if not isinstance(output, torch.Tensor):
            return output[0], tokens
        text = output[:, : -tokens.shape[1]]
        return torch.cat([text, tokens.to(text.dtype)], 1) if text.shape[1] else tokens

    def prediction_map(self, guided: GuidedPass, prediction: torch.Tensor) -> torch.Tensor:
        assert guided.call is not None
        return to_map(prediction, guided.call.latents.shape[-2:])

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

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

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

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep.float()

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return time

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
