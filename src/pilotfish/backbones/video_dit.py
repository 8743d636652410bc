"""WanTransformer3DModel: Wan 2.1 and 2.2, text or image to video.

Text enters through cross-attention after a projection, padded with zeros to one length. The
frames of a video are laid one below the other for the guide, so that everywhere it adds to maps
(N, channels, F h, w). An image enters as further channels of the latents, and in Wan 2.1 through
cross-attention of its own, whose output is added to that of the text. Wan 2.2 has two denoisers of
one shape, for high and low noise, each with its scale: one guide, which is given the time and the
scale, works on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.cross_attention_dit import CrossAttentionDiTBackbone
from pilotfish.interface import TextConditions


class VideoDiTBackbone(CrossAttentionDiTBackbone):
    """See the module."""

    family = "video-dit"
    denoisers = (WanTransformer3DModel,)
    parameters = ("hidden_states", "timestep", "encoder_hidden_states")
    stacks = ("blocks",)
    text_layer = "condition_embedder.text_embedder.linear_1"
    mask_argument = None
    projections = ("condition_embedder.text_embedder",)
    norm_across_heads = True
    reads_images = True
    further_components = ("transformer_2",)
    further_scales = ("guidance_scale_2",)
    negative_from_callback = True
    spatial_factor = "vae_scale_factor_spatial"
    temporal_factor = "vae_scale_factor_temporal"
    takes_times = False

    @property
    def patch(self) -> int:
        return int(self.denoiser.config.patch_size[-1])

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        timestep = given["timestep"]
        if timestep.ndim == 2:  # one for each token, alike for all that are noisy
            timestep = timestep.amax(1)
        text = TextConditions(given["encoder_hidden_states"])
        return DenoiserCall(self.on_grid(given["hidden_states"]), timestep, text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return super().on_grid(latents.flatten(2, 3))

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        repeated = super().doubled(guided, given)
        image = given.get("encoder_hidden_states_image")
        if image is not None:  # two rows a sample where there is a last image, too
            repeated["encoder_hidden_states_image"] = torch.cat([image, image])
        return repeated

    # -- the pipeline -----------------------------------------------------------------------

    def scale_at_step(self, pipe: Any, guidance_scale: Any) -> Any:
        second = getattr(pipe, "_guidance_scale_2", None)
        if second is None or guidance_scale <= 1 or pipe.current_timestep is None:
            return guidance_scale  # which decides for both denoisers whether there is guidance
        boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
        return guidance_scale if pipe.current_timestep >= boundary else second

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        length = signature(WanPipeline.__call__).parameters["max_sequence_length"].default
        return {"prompt": list(texts), "num_videos_per_prompt": 1, "max_sequence_length": length}

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, negative = encoded
        return TextConditions(prompt), None if negative is None else TextConditions(negative)

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, F, h, w) of the pipeline's default: 81 frames of 832 x 480 pixels."""
        # of 16 pixels by the VAE of Wan 2.2 with 5 billion parameters
        height, width = (30, 52) if self.channels == 48 else (60, 104)
        return self.channels, 21, height, width
