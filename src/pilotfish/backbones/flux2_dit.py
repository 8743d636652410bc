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
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import Flux2Modulation
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.doubling import without_mask
from pilotfish.backbones.extrapolation import joined_attention, up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.tokens import to_map, to_tokens
from pilotfish.interface import TextConditions


class Flux2DiTBackbone(Backbone):
    """See the module."""

    family = "flux2-dit"
    denoisers = (Flux2Transformer2DModel,)
    joint_attention = ("whole",)
    parameters = (
        "hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance",
    )  # fmt: skip
    separate_negative = True
    default_negative = ""
    packing = 2

    def sites(self) -> dict[str, Any]:
        net = self.denoiser
        blocks = {f"transformer_blocks.{i}": b for i, b in enumerate(net.transformer_blocks)}
        blocks |= {
            f"single_transformer_blocks.{i}": b for i, b in enumerate(net.single_transformer_blocks)
        }
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

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            """The prompts are embedded: begin the negative prompt's stream."""
            stream = guided.cache.made_by(
                module, lambda: module.forward(guided.negative.embeds), [module]
            )
            guided.scratch["stream", attention[0]] = stream.expand(len(output), -1, -1)

        def modulated(kind: str) -> Any:
            def after(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
                guided.scratch[kind] = output

            return after

        if attention:
            hooks.after(net.context_embedder, embedded)
            hooks.after(net.double_stream_modulation_txt, modulated("of two streams"))
            hooks.after(net.single_stream_modulation, modulated("of one stream"))
        for i, name in enumerate(attention):
            following = attention[i + 1] if i + 1 < len(attention) else None
            block = hooks.modules[name.removesuffix(".attn")]
            if name.startswith("single"):
                self._place_one_stream(hooks, name, block, following)
            else:
                self._place_two_streams(hooks, name, block, following)
        self.place_residuals(hooks)

    def _place_two_streams(
        self, hooks: Hooks, name: str, block: Any, following: str | None
    ) -> None:  # fmt: skip
        """Extrapolate the attention of one of the first blocks where the guide has a gain for it,
        and take the negative prompt's stream to the next block."""
        layer = block.attn

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            of_attention, of_ff = Flux2Modulation.split(guided.scratch["of two streams"], 2)
            shift, scale, gate = of_attention
            x = block.norm1_context.forward(stream) * (1 + scale) + shift
            length, size = stream.shape[1], q.shape[-1]

            def heads(projection: Any) -> torch.Tensor:
                made: torch.Tensor = projection.forward(x).unflatten(-1, (-1, size))
                return made

            made = _attended(
                guided,
                torch.cat([layer.norm_added_q.forward(heads(layer.add_q_proj)), q], 1),
                torch.cat([layer.norm_added_k.forward(heads(layer.add_k_proj)), k], 1),
                torch.cat([heads(layer.add_v_proj), v.unflatten(-1, (-1, size))], 1),
            )
            if following is not None:
                out = layer.to_add_out.forward(made[:, :length].flatten(2))
                stream = stream + gate * out
                shift, scale, gate = of_ff
                x = block.norm2_context.forward(stream) * (1 + scale) + shift
                stream = stream + gate * block.ff_context.forward(x)
                guided.scratch["stream", following] = _clipped(stream)
            if not guided.extrapolates(name):
                return None
            own = output.unflatten(-1, (layer.heads, -1))
            return guided.extrapolate(name, own, made[:, length:], by_head=True).flatten(2)

        joined_attention(hooks, name, layer, attend)

    def _place_one_stream(
        self, hooks: Hooks, name: str, block: Any, following: str | None
    ) -> None:  # fmt: skip
        """The same of one of the other blocks."""
        layer = block.attn
        width = layer.inner_dim

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            ((shift, scale, gate),) = Flux2Modulation.split(guided.scratch["of one stream"], 1)
            x = block.norm.forward(stream) * (1 + scale) + shift
            projected = layer.to_qkv_mlp_proj.forward(x)
            parts = projected.split([width, width, width, projected.shape[-1] - 3 * width], -1)
            length, size = stream.shape[1], q.shape[-1]
            q_n, k_n, v_n = (part.unflatten(-1, (-1, size)) for part in parts[:3])
            text = q.shape[1] - guided.scratch["tokens"]  # of the prompt, before the image
            own_v = v[:, text:, 2 * width : 3 * width].unflatten(-1, (-1, size))
            made = _attended(
                guided,
                torch.cat([layer.norm_q.forward(q_n), q[:, text:]], 1),
                torch.cat([layer.norm_k.forward(k_n), k[:, text:]], 1),
                torch.cat([v_n, own_v], 1),
            )
            if following is not None:
                of_ff = layer.mlp_act_fn.forward(parts[3])
                out = layer.to_out.forward(torch.cat([made[:, :length].flatten(2), of_ff], -1))
                guided.scratch["stream", following] = _clipped(stream + gate * out)
            if not guided.extrapolates(name):
                return None
            own = output[:, text:, :width].unflatten(-1, (layer.heads, -1))
            changed = guided.extrapolate(name, own, made[:, length:], by_head=True).flatten(2)
            rows = torch.cat([changed.to(output.dtype), output[:, text:, width:]], -1)
            return torch.cat([output[:, :text], rows], 1)

        joined_attention(
            hooks, name, layer, attend, value=layer.to_qkv_mlp_proj, out=layer.to_out
        )  # fmt: skip

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        assert guided.call is not None
        tokens = output if isinstance(output, torch.Tensor) else output[1]  # (text, image)
        grid = guided.call.latents.shape[-2:]
        first = tokens.shape[1] - guided.scratch["tokens"]
        return to_map(tokens[:, first : first + grid.numel()], grid)

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        tokens = output if isinstance(output, torch.Tensor) else output[1]
        first = tokens.shape[1] - guided.scratch["tokens"]
        own = to_tokens(made).to(tokens.dtype)
        if own.shape[1] < tokens.shape[1]:
            own = torch.cat([tokens[:, :first], own, tokens[:, first + own.shape[1] :]], 1)
        return own if isinstance(output, torch.Tensor) else (output[0], own)

    def prediction_map(self, guided: GuidedPass, prediction: torch.Tensor) -> torch.Tensor:
        return self.image_map(guided, "", prediction)

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        own = _ids(given) * (_ids(given)[:, :1] == 0)  # those of reference images have other times
        height, width = (int(last) + 1 for last in own.amax(0)[1:3].tolist())
        tokens = given["hidden_states"][:, : height * width]
        latents = to_map(tokens, torch.Size([height, width]))
        return DenoiserCall(
            latents, given["timestep"], TextConditions(given["encoder_hidden_states"])
        )

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        ids = _ids(given)
        guided.scratch["tokens"] = len(ids)
        if guided.output.gains:
            negative = text_ids(guided.negative.embeds.shape[1], ids.device)
            both = torch.cat([negative, ids])
            guided.scratch["rotations"] = self.denoiser.pos_embed.forward(both)
        return super().changed(guided, given)

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        guided.scratch["tokens"] = len(_ids(given))
        return super().doubled(guided, given)

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": without_mask(text)}

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

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep.float()

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return time

    # -- the pipeline -----------------------------------------------------------------------

    def refusal(self, pipe: Any) -> str | None:
        if self.denoiser.config.guidance_embeds:
            return "its denoiser takes in the guidance scale and needs no second pass"
        if pipe.config.get("is_distilled"):
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


def _attended(
    guided: GuidedPass, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """(N, tokens, heads, width) attention among the negative prompt's tokens and the image's."""
    q, k = (apply_rotary_emb(x, guided.scratch["rotations"], sequence_dim=1) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _clipped(stream: torch.Tensor) -> torch.Tensor:
    """A stream within half precision, as the denoiser's blocks keep it."""
    return stream.clip(-65504, 65504) if stream.dtype == torch.float16 else stream
