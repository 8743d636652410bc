"""LTXVideoTransformer3DModel: LTX-Video, text and image to video.

Text enters through cross-attention after a projection, padded to one length and masked. Latents are
packed: one token for each place of each frame. The frames are laid one below the other for the
guide, as maps (N, channels, F h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel

from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.cross_attention_dit import CrossAttentionDiTBackbone
from pilotfish.backbones.pipeline import per_channel, shift_by_size
from pilotfish.backbones.tokens import to_map, to_tokens
from pilotfish.interface import TextConditions

STRIDES = (8 / 25, 32, 32)
"""Seconds of a latent frame at the pipeline's default rate, and pixels of a latent: the denoiser
takes positions in these. Of LTX-Video's own VAE."""


class LTXBackbone(CrossAttentionDiTBackbone):
    """See the module."""

    family = "ltx-dit"
    denoisers = (LTXVideoTransformer3DModel,)
    parameters = (
        "hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask",
        "num_frames", "height", "width", "rope_interpolation_scale",
    )  # fmt: skip
    norm_across_heads = True
    spatial_factor = "vae_spatial_compression_ratio"
    temporal_factor = "vae_temporal_compression_ratio"
    takes_times = False  # it makes the even grid by itself
    frame_rate = 25

    @property
    def patch(self) -> int:
        return 1  # the pipeline packs

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        # RMSNorm rounds otherwise where channels do not lie side by side
        return to_tokens(made).contiguous()

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        grid = torch.Size([given["num_frames"] * given["height"], given["width"]])
        timestep = given["timestep"]
        if timestep.ndim == 2:  # one for each token, alike for all that are noisy
            timestep = timestep.amax(1)
        text = TextConditions(
            given["encoder_hidden_states"], mask=given.get("encoder_attention_mask")
        )
        return DenoiserCall(to_map(given["hidden_states"], grid), timestep, text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.flatten(2, 3)

    def prediction_map(self, guided: GuidedPass, prediction: torch.Tensor) -> torch.Tensor:
        assert guided.call is not None
        return to_map(prediction, guided.call.latents.shape[-2:])

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        frames, height, width = latents.shape[2:]
        strides = STRIDES if sizes is None else sizes[0].tolist()
        made = self.denoiser(
            hidden_states=to_tokens(latents), encoder_hidden_states=text.embeds,
            timestep=self.timestep(time), encoder_attention_mask=text.mask, num_frames=frames,
            height=height, width=width, rope_interpolation_scale=strides, return_dict=False,
        )[0]  # fmt: skip
        prediction: torch.Tensor = made.transpose(1, 2).unflatten(2, (frames, height, width))
        return prediction

    # -- the pipeline -----------------------------------------------------------------------

    def refusal(self, pipe: Any) -> str | None:
        call = signature(type(pipe).__call__).parameters
        if "conditions" in call:
            return "its denoiser reads frames in addition to those that it generates"
        if "prompt_segments" in call:
            return "it calls its denoiser for parts of a longer video"
        return None

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"prompt": list(texts), "num_videos_per_prompt": 1}

    def sizes(self, pipe: Any) -> torch.Tensor:
        """(1, 3) the :data:`STRIDES` of the pipeline's VAE."""
        side = self.vae_factor(pipe)
        seconds = pipe.vae_temporal_compression_ratio / self.frame_rate
        return torch.tensor([[seconds, side, side]])

    def dynamic_shift(self, scheduler: Any) -> Callable[[int], float]:
        mu = shift_by_size(scheduler, self.latent_shape())
        return lambda steps: mu

    def decoding(self, vae: Any, latents: torch.Tensor) -> dict[str, Any]:
        # at time 0 and without noise, as the pipeline does where it is given no decode_timestep
        return {"temb": latents.new_zeros(len(latents))} if vae.config.timestep_conditioning else {}

    def vae_statistics(self, vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
        mean, std = (per_channel(x, like) for x in (vae.latents_mean, vae.latents_std))
        return mean, vae.config.scaling_factor / std

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, F, h, w) of the pipeline's default: 161 frames of 704 x 512 pixels."""
        return int(self.denoiser.config.in_channels), 21, 16, 22
