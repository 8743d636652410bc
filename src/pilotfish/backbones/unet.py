"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x, XL and their kin.

Text enters through cross-attention, and in some models through the embedding of the timestep as
well, which the residual layers take scale and shift from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.extrapolation import cross_attention
from pilotfish.backbones.hooks import Hooks
from pilotfish.interface import GuideError, TextConditions

TEXT_EMBEDDED = ("text", "text_time")
"""How text may enter the embedding of the timestep: its hidden states are pooled there, or it
comes pooled, with SDXL's sizes."""


class UNetBackbone(Backbone):
    """See the module."""

    family = "unet"
    denoisers = (UNet2DConditionModel,)
    component = "unet"
    parameters = ("sample", "timestep", "encoder_hidden_states")

    def sites(self) -> dict[str, Any]:
        net = self.denoiser
        return {
            "text_dim": self._text_dim(),
            "attention": [[name, layer.heads] for name, layer in self._cross_attentions()],
            "modulation": self._modulated(),
            "layers": list(self._decoder()),
            "head": {
                "module": "conv_out",
                "features": plain(net.conv_out).in_channels,
                "channels": plain(net.conv_out).out_channels,
            },
            "encoder": list(self._skips()),
            "middle": self._width(len(net.down_blocks) - 1),
        }

    def _text_dim(self) -> int:
        width = self.denoiser.config.cross_attention_dim
        widths = {width} if isinstance(width, int) else set(width)
        if len(widths) > 1:
            raise GuideError(
                f"this UNet takes in texts of several widths, {sorted(widths)}, which no guide fits"
            )
        return int(widths.pop())

    def _cross_attentions(self) -> Iterator[tuple[str, Any]]:
        """Of mid block and decoder, in running order."""
        blocks = {"mid_block": self.denoiser.mid_block}
        blocks |= {f"up_blocks.{i}": block for i, block in enumerate(self.denoiser.up_blocks)}
        for place, block in blocks.items():
            for j, attention in enumerate(getattr(block, "attentions", None) or ()):
                for k, inner in enumerate(getattr(attention, "transformer_blocks", ())):
                    if getattr(inner, "attn2", None) is not None:
                        name = f"{place}.attentions.{j}.transformer_blocks.{k}.attn2"
                        yield name, inner.attn2

    def _modulated(self) -> list[str]:
        """The residual layers, in running order, where the embedding holds the text, added to
        that of the timestep and not bent by an activation after that."""
        net = self.denoiser
        if net.config.addition_embed_type not in TEXT_EMBEDDED or net.time_embed_act is not None:
            return []
        blocks = {f"down_blocks.{i}": block for i, block in enumerate(net.down_blocks)}
        blocks |= {"mid_block": net.mid_block}
        blocks |= {f"up_blocks.{i}": block for i, block in enumerate(net.up_blocks)}
        return [
            f"{place}.resnets.{j}"
            for place, block in blocks.items()
            for j in range(len(getattr(block, "resnets", ())))
        ]

    def _decoder(self) -> Iterator[list[Any]]:
        """The decoder's residual and attention layers in running order, and their channels."""
        for i, block in enumerate(self.denoiser.up_blocks):
            attentions = getattr(block, "attentions", None) or ()
            for j, layer in enumerate(block.resnets):
                yield [f"up_blocks.{i}.resnets.{j}", layer.out_channels]
                if j < len(attentions):
                    yield [f"up_blocks.{i}.attentions.{j}", layer.out_channels]

    def _skips(self) -> Iterator[list[int]]:
        """[channels, level] of each skip feature, in the order in which the encoder makes them;
        level 0 has the latents' resolution, each next one half."""
        net = self.denoiser
        yield [plain(net.conv_in).out_channels, 0]
        for level, block in enumerate(net.down_blocks):
            for _ in block.resnets:
                yield [self._width(level), level]
            if block.downsamplers is not None:
                yield [self._width(level), level + 1]

    def _width(self, level: int) -> int:
        return int(self.denoiser.down_blocks[level].resnets[-1].out_channels)

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        net, embedded = self.denoiser, set(self._modulated())

        def negative_states(guided: GuidedPass) -> tuple[torch.Tensor, None]:
            return guided.negative.embeds, None

        for name in hooks.guide.extrapolated:
            layer = hooks.modules[name]
            if name in embedded:
                self._place_modulation(hooks, name, layer)
                continue
            if hasattr(layer.processor, "to_k_custom_diffusion"):
                raise GuideError(
                    f"{name} has keys and values of Custom Diffusion, which cannot be "
                    "extrapolated; use the pipeline without a guide"
                )
            cross_attention(hooks, name, layer, negative_states)
        if embedded & set(hooks.guide.extrapolated):
            hooks.after(net.add_embedding, self._pool_negative)
        self.place_residuals(hooks)

    def _pool_negative(
        self, guided: GuidedPass, pooling: Any, args: Any, made: torch.Tensor
    ) -> None:
        """The denoiser embedded the text, (N, E): note how to embed the negative prompt."""

        def pool() -> torch.Tensor:
            pooled = guided.negative.pooled
            if pooled is None:  # the hidden states are pooled here
                embeds = guided.negative.embeds
                return guided.cache.made_by(
                    pooling, lambda: pooling.forward(embeds), _within(pooling)
                )
            sizes = args[0][:, pooled.shape[1] :]  # SDXL's pooled text, with the sizes after it
            pooled = pooled.to(args[0]).expand(len(sizes), -1)
            embedded: torch.Tensor = pooling.forward(torch.cat([pooled, sizes], 1))
            return embedded

        guided.scratch["pool"], guided.scratch["pooled"] = pool, made

    def _place_modulation(self, hooks: Hooks, name: str, layer: Any) -> None:
        net = self.denoiser
        plain_time = net.class_embedding is None and net.time_embed_act is None
        parts = [*_within(net.add_embedding), *_within(net.time_embedding), layer.time_emb_proj]

        def negatives(timesteps: torch.Tensor) -> tuple[torch.Tensor]:
            """(T, N, channels) the layer's projection for the negative prompt, at all times."""
            pooled = hooks.current().scratch["pool"]()  # type: ignore[union-attr]
            time = net.time_embedding(net.time_proj(timesteps).to(pooled.dtype))
            temb = time[:, None] + pooled
            temb = temb if layer.skip_time_act else layer.nonlinearity(temb)
            return (layer.time_emb_proj.forward(temb),)

        def embedding(guided: GuidedPass, module: Any, args: Any, kwargs: Any) -> None:
            guided.scratch["temb"] = args[1]  # all residual layers are given the same

        def projected(
            guided: GuidedPass, module: Any, args: Any, output: torch.Tensor
        ) -> torch.Tensor | None:
            if not guided.extrapolates(name):
                return None
            known = guided.cache.at_step(layer, negatives, lambda: parts) if plain_time else None
            if known is not None:
                (negative,) = known
            else:
                scratch = guided.scratch
                # all residual layers are given one embedding and apply one function to it; with
                # gradients each applies it anew, since checkpointing runs single layers again
                if torch.is_grad_enabled() or "negative temb" not in scratch:
                    temb = scratch["temb"] + (scratch["pool"]() - scratch["pooled"])
                    temb = temb if layer.skip_time_act else layer.nonlinearity(temb)
                    scratch["negative temb"] = temb
                negative = module.forward(scratch["negative temb"])
            return guided.extrapolate(name, output, negative.expand_as(output))

        hooks.before(layer, embedding)
        hooks.after(layer.time_emb_proj, projected)

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        added = given.get("added_cond_kwargs") or {}
        return DenoiserCall(
            self.on_grid(given["sample"]), given["timestep"],
            TextConditions(given["encoder_hidden_states"], added.get("text_embeds")),
            {k: v for k, v in added.items() if isinstance(v, torch.Tensor)},
        )  # fmt: skip

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        # inpainting has further channels, a mask and an image
        return latents[:, : plain(self.denoiser.conv_out).out_channels]

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"encoder_hidden_states": text.embeds}
        if text.mask is not None:  # prompts of two lengths
            found["encoder_attention_mask"] = text.mask
        if text.pooled is not None:
            found["added_cond_kwargs"] = {
                **given["added_cond_kwargs"], "text_embeds": text.pooled
            }  # fmt: skip
        return found

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        changed = super().doubled(guided, given)
        images = (given.get("added_cond_kwargs") or {}).get("image_embeds")
        if guided.negative_images is not None and images is not None:
            pairs = zip(guided.negative_images, images, strict=True)
            both = [torch.cat(pair) for pair in pairs]
            changed["added_cond_kwargs"] = {**changed["added_cond_kwargs"], "image_embeds": both}
        return changed

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        changed = super().changed(guided, given)
        if guided.output.encoder is not None:
            # where a ControlNet adds to the same features, both do
            skips, middle = guided.output.encoder
            before = given.get("down_block_additional_residuals")
            if before is not None and given.get("mid_block_additional_residual") is not None:
                skips = tuple(b + s for b, s in zip(before, skips, strict=True))
                middle = given["mid_block_additional_residual"] + middle
            changed["down_block_additional_residuals"] = tuple(map(guided.to_denoiser, skips))
            changed["mid_block_additional_residual"] = guided.to_denoiser(middle)
        return changed

    # -- calls --------------------------------------------------------------------------------

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        more = {}
        if text.pooled is not None and sizes is not None:
            sizes = sizes.to(text.device, text.dtype).expand(len(latents), -1)
            more = {"added_cond_kwargs": {"text_embeds": text.pooled, "time_ids": sizes}}
        made: torch.Tensor = self.denoiser(
            latents, self.timestep(time), text.embeds, return_dict=False, **more
        )[0]
        return made

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return (time * self.num_train_timesteps).round().long()

    def refusal(self, pipe: Any) -> str | None:
        config = self.denoiser.config
        if config.time_cond_proj_dim is not None:
            return "its denoiser takes in the guidance scale and needs no second pass"
        if config.encoder_hid_dim_type not in (None, "ip_image_proj"):
            return f"its denoiser projects the text once more ({config.encoder_hid_dim_type})"
        return None

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        # SDXL: prompt, negative, and both pooled
        prompt, negative, *pooled = encoded
        if negative is None:
            return TextConditions(prompt, *pooled[:1]), None
        return TextConditions(prompt, *pooled[:1]), TextConditions(negative, *pooled[1:2])

    def sizes(self, pipe: Any) -> torch.Tensor | None:
        """(1, 6) SDXL's sizes and crop, or (1, 5) of its refiner, whose last is the score."""
        config = self.denoiser.config
        if config.addition_embed_type != "text_time":
            return None
        _, height, width = self.latent_shape()
        high, wide = height * pipe.vae_scale_factor, width * pipe.vae_scale_factor
        if getattr(pipe.config, "requires_aesthetics_score", False):
            return torch.tensor([[high, wide, 0, 0, 6.0]])
        return torch.tensor([[high, wide, 0, 0, high, wide]], dtype=torch.float32)


def _within(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules inside another."""
    return [part for child in module.children() for part in child.modules()]
