"""WanTransformer3DModel: Wan 2.1, text to video.

Text enters through cross-attention after a projection, padded with zeros to one length. The
frames of a video are laid one below the other for the guide, so that everywhere it adds to maps
(N, channels, F h, w).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from pilotfish.backbones.context import DenoiserCall
from pilotfish.backbones.cross_attention_dit import CrossAttentionDiTBackbone
from pilotfish.backbones.doubling import without_mask
from pilotfish.interface import TextConditions


class VideoDiTBackbone(CrossAttentionDiTBackbone):
    """See the module."""

    family = "video-dit"
    denoisers = (WanTransformer3DModel,)
    parameters = ("hidden_states", "timestep", "encoder_hidden_states")
    blocks = "blocks"
    projections = ("condition_embedder.text_embedder",)
    norm_across_heads = True
    negative_from_callback = True
    decodable = False

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

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": without_mask(text)}

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.denoiser(
            hidden_states=latents, timestep=self.timestep(time),
            encoder_hidden_states=text.embeds, return_dict=False,
        )[0]  # fmt: skip
        return prediction

    # -- the pipeline -----------------------------------------------------------------------

    def refusal(self, pipe: Any) -> str | None:
        if getattr(pipe, "transformer_2", None) is not None:
            return "it has two denoisers (transformer_2), and a guide is made for one"
        config = self.denoiser.config
        if config.in_channels > (config.out_channels or config.in_channels):
            return "its denoiser reads images in addition to the video that it generates"
        if config.added_kv_proj_dim is not None:
            return "its cross-attention reads an image together with the text (added_kv_proj_dim)"
        return None

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        length = signature(WanPipeline.__call__).parameters["max_sequence_length"].default
        return {"prompt": list(texts), "num_videos_per_prompt": 1, "max_sequence_length": length}

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, negative = encoded
        return TextConditions(prompt), None if negative is None else TextConditions(negative)

    def latent_shape(self) -> tuple[int, ...]:
        """(C, F, h, w) of the pipeline's default: 81 frames of 832 x 480 pixels."""
        return int(self.denoiser.config.in_channels), 21, 60, 104
