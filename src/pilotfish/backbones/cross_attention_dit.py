"""PixArtTransformer2DModel (PixArt-Alpha and PixArt-Sigma) and SanaTransformer2DModel (Sana).

Text enters through cross-attention after a projection, padded to one length and masked. PixArt
predicts epsilon and a variance, which sampling does not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel, SanaPipeline, SanaTransformer2DModel

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.extrapolation import cross_attention
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.tokens import to_tokens
from pilotfish.backbones.transformer import TransformerBackbone
from pilotfish.interface import TextConditions


class CrossAttentionDiTBackbone(TransformerBackbone):
    """What the two have in common."""

    parameters: ClassVar[tuple[str, ...]] = (
        "hidden_states", "encoder_hidden_states", "timestep",
    )  # fmt: skip
    text_is_projected = True
    attention_layer = "attn2"
    text_layer = "caption_projection.linear_1"
    mask_argument: ClassVar[str | None] = "encoder_attention_mask"
    projections: ClassVar[tuple[str, ...]] = ("caption_projection",)
    """The modules that the text passes one after the other before the first block."""
    norm_across_heads: ClassVar[bool] = False
    """Whether cross-attention normalises queries and keys before it splits them into heads."""
    reads_images: ClassVar[bool] = False
    """Whether cross-attention may add an attention to an image to that to the text."""

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        passed = [hooks.modules[name] for name in self.projections]
        layers = [m for module in passed for m in (module, *module.children())]

        def project(embeds: torch.Tensor) -> torch.Tensor:
            for module in passed:
                embeds = module.forward(embeds)
            return embeds

        def projected(
            guided: GuidedPass, module: Any, args: Any, output: torch.Tensor
        ) -> torch.Tensor:
            """The projection is not linear, so the text is extrapolated after it."""
            embeds = guided.cache.made_by(
                passed[-1], lambda: project(guided.negative.embeds), layers
            )
            negative = TextConditions(embeds, mask=guided.negative.mask)
            guided.scratch["negative"] = negative
            return guided.extrapolated_text(output, negative)

        def negative_states(guided: GuidedPass) -> tuple[torch.Tensor, torch.Tensor | None]:
            negative = guided.scratch["negative"]
            if negative.mask is None:
                return negative.embeds, None
            bias = (1 - negative.mask.to(negative.dtype)) * -10000.0
            return negative.embeds, bias[:, None, None]

        hooks.after(passed[-1], projected)
        for name in hooks.guide.extrapolated:
            cross_attention(
                hooks, name, hooks.modules[name], negative_states,
                norm_across_heads=self.norm_across_heads, reads_images=self.reads_images,
            )  # fmt: skip
        self.place_residuals(hooks)

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        if name == "proj_out" and self.has_variance:
            output = self._by_pixel(output)[..., : self.channels].flatten(2)
        return super().image_map(guided, name, output)

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        if name != "proj_out" or not self.has_variance:
            return super().with_image_map(guided, name, output, made)
        pixels = self._by_pixel(output)
        epsilon = to_tokens(made).unflatten(2, (-1, self.channels))
        return torch.cat([epsilon, pixels[..., self.channels :]], -1).flatten(2)

    @property
    def channels(self) -> int:
        """Channels of the latents: those of the denoiser's input without those of an image that it
        reads, or of its output without the variance."""
        config = self.denoiser.config
        return int(min(config.in_channels, config.out_channels or config.in_channels))

    @property
    def has_variance(self) -> bool:  # type: ignore[override]
        config = self.denoiser.config
        return bool((config.out_channels or config.in_channels) > config.in_channels)

    def _by_pixel(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, tokens, p^2 C) -> (N, tokens, p^2, C)."""
        return tokens.unflatten(2, (self.patch**2, -1))

    # -- calls ------------------------------------------------------------------------------

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return super().on_grid(latents[:, : self.channels])

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, mask, negative, negative_mask = encoded
        kept = None if negative is None else TextConditions(negative, mask=negative_mask)
        return TextConditions(prompt, mask=mask), kept


class PixArtBackbone(CrossAttentionDiTBackbone):
    """PixArt-Alpha and PixArt-Sigma."""

    family = "cross-attention-dit"
    denoisers = (PixArtTransformer2DModel,)
    cfg_by_argument = True

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        made = self.denoiser(
            latents, encoder_hidden_states=text.embeds, timestep=self.timestep(time),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=text.mask, return_dict=False,
        )[0]  # fmt: skip
        prediction: torch.Tensor = made[:, : self.denoiser.config.in_channels]
        return prediction

    def refusal(self, pipe: Any) -> str | None:
        if self.denoiser.config.use_additional_conditions:
            return "its denoiser takes resolution and aspect ratio (PixArt-Alpha at 1024 pixels)"
        return None


class SanaBackbone(CrossAttentionDiTBackbone):
    """Sana: flow matching, linear attention among the image's tokens."""

    family = "sana"
    denoisers = (SanaTransformer2DModel,)
    projections = ("caption_projection", "caption_norm")
    norm_across_heads = True
    other_negatives = True  # its call writes an instruction before a prompt alone

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return self.schedule_time(timestep / self.denoiser.config.timestep_scale)

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = super().timestep(time) * self.denoiser.config.timestep_scale
        return scaled

    def refusal(self, pipe: Any) -> str | None:
        if self.denoiser.config.guidance_embeds:
            return "its denoiser takes in the guidance scale and needs no second pass"
        return None

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        instruction = signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
        return {**super().encoding(texts), "complex_human_instruction": instruction.default}
