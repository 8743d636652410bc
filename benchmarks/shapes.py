"""Denoisers at full size with random weights: the configurations of published models.

The cost of a pass does not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    Lumina2Transformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import nn

POOLED = 1280
JOINED = QwenImageTransformer2DModel, ZImageTransformer2DModel, Lumina2Transformer2DModel
"""Those with joint attention, beside Stable Diffusion 3."""


@dataclass(frozen=True)
class Shape:
    """A published denoiser.

    Attributes:
        config: of the denoiser.
        prediction_type: what it predicts.
        denoiser: its class.
        tokens: of a prompt, as the pipeline pads it; of a long one where it pads none.
        masked: whether the denoiser is given a mask of the prompt's tokens.
        pooled: channels of the pooled text, where the denoiser takes it.
        side: pixels of an image of the pipeline's default size, each way; None for videos.
        narrow: changes to ``config`` that leave all layers, a small part as wide.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    prediction_type: str = "epsilon"
    denoiser: type[nn.Module] = UNet2DConditionModel
    tokens: int = 77
    masked: bool = False
    pooled: int | None = None
    side: int | None = 512
    narrow: Mapping[str, Any] = field(default_factory=dict)

    @property
    def guides(self) -> tuple[str, ...]:
        """The types of guide that fit."""
        if self.denoiser is UNet2DConditionModel:
            return "tiny", "full"
        if self.denoiser is SD3Transformer2DModel:
            return "tiny", "tiny-cached", "tiny-sampled"
        return ("tiny", "tiny-cached") if self.denoiser in JOINED else ("tiny",)


_SD: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}  # fmt: skip
_SD3: dict[str, Any] = {
    "sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}  # fmt: skip
_SD3_NARROW: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 4, "caption_projection_dim": 8,
    "joint_attention_dim": 32, "pooled_projection_dim": 32,
}  # fmt: skip
_WAN_NARROW: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "ffn_dim": 32,
}  # fmt: skip
SHAPES = {
    "sd15": Shape(_SD | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd21": Shape(
        _SD | {
            "sample_size": 96, "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
        },
        "v_prediction", side=768,
    ),
    "sdxl": Shape({
        "sample_size": 128, "in_channels": 4, "out_channels": 4,
        "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + POOLED,
    }, pooled=POOLED, side=1024),
    "sd35-medium": Shape(
        _SD3 | {
            "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
            "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)),
        },
        "flow", SD3Transformer2DModel, tokens=77 + 256, pooled=2048, side=1024, narrow=_SD3_NARROW,
    ),
    "sd35-large": Shape(
        _SD3 | {
            "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
        },
        "flow", SD3Transformer2DModel, tokens=77 + 256, pooled=2048, side=1024, narrow=_SD3_NARROW,
    ),
    "qwen-image": Shape(
        {}, "flow", QwenImageTransformer2DModel, tokens=128, side=1024, narrow={
            "in_channels": 16, "out_channels": 4, "num_attention_heads": 2,
            "attention_head_dim": 12, "axes_dims_rope": (4, 4, 4), "joint_attention_dim": 32,
        },
    ),
    "z-image": Shape(
        {}, "flow", ZImageTransformer2DModel, tokens=128, masked=True, side=1024, narrow={
            "in_channels": 4, "dim": 24, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
            "axes_dims": (4, 4, 4), "axes_lens": (256, 128, 128),
        },
    ),
    "lumina2": Shape(
        {"cap_feat_dim": 2304}, "flow", Lumina2Transformer2DModel, tokens=256, masked=True,
        side=1024, narrow={
            "hidden_size": 24, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4), "cap_feat_dim": 32,
        },
    ),
    "sana": Shape(
        {}, "flow", SanaTransformer2DModel, tokens=300, masked=True, side=1024, narrow={
            "num_attention_heads": 2, "attention_head_dim": 4, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 32,
        },
    ),
    "wan-1.3b": Shape(
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, "flow",
        WanTransformer3DModel, tokens=512, side=None, narrow=_WAN_NARROW,
    ),
    "wan-14b": Shape(
        {}, "flow", WanTransformer3DModel, tokens=512, side=None, narrow=_WAN_NARROW
    ),
}  # fmt: skip
"""Stable Diffusion 1.5, 2.1 at 768 pixels and XL; Stable Diffusion 3.5, Qwen-Image, Z-Image,
Lumina Image 2.0, Sana 1.6B and Wan 2.1 (81 frames of 832 x 480 pixels)."""
