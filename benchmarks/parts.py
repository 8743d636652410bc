"""Text encoders and VAEs of the published models, whose memory is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768,
}  # fmt: skip
_OPEN_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "projection_dim": 1024,
}  # fmt: skip
_OPEN_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280,
}  # fmt: skip
_T5_XXL: dict[str, Any] = {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_QWEN_VL_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "vision_config": {
        "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    },
}  # fmt: skip
_QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
_Encoders = tuple[tuple[type[Any], PreTrainedConfig], ...]
_SD3: _Encoders = (
    (CLIPTextModelWithProjection, CLIPTextConfig(**_CLIP_L)),
    (CLIPTextModelWithProjection, CLIPTextConfig(**_OPEN_CLIP_G)),
    (T5EncoderModel, T5Config(**_T5_XXL)),
)
_GEMMA: _Encoders = ((Gemma2Model, Gemma2Config()),)
_WAN: _Encoders = ((UMT5EncoderModel, UMT5Config(vocab_size=256384, **_T5_XXL)),)
TEXT_ENCODERS: Mapping[str, _Encoders] = {
    "sd15": ((CLIPTextModel, CLIPTextConfig(**_CLIP_L)),),
    "sd21": ((CLIPTextModel, CLIPTextConfig(**_OPEN_CLIP_H)),),
    "sdxl": (
        (CLIPTextModel, CLIPTextConfig(**_CLIP_L)),
        (CLIPTextModelWithProjection, CLIPTextConfig(**_OPEN_CLIP_G)),
    ),
    "sd35-medium": _SD3,
    "sd35-large": _SD3,
    "qwen-image": ((Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(**_QWEN_VL_7B)),),
    "z-image": ((Qwen3Model, Qwen3Config(**_QWEN3_4B)),),
    "lumina2": _GEMMA,
    "sana": _GEMMA,
    "wan-1.3b": _WAN,
    "wan-14b": _WAN,
}
"""Of the published models, by the name of the shape."""
_KL: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
}  # fmt: skip
_KL_16 = partial(
    AutoencoderKL, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, **_KL
)
VAES: Mapping[str, Callable[[], nn.Module]] = {
    **dict.fromkeys(("sd15", "sd21", "sdxl"), partial(AutoencoderKL, latent_channels=4, **_KL)),
    **dict.fromkeys(("sd35-medium", "sd35-large", "z-image", "lumina2"), _KL_16),
    "qwen-image": AutoencoderKLQwenImage,
    "sana": partial(
        AutoencoderDC, downsample_block_type="Conv", upsample_block_type="interpolate",
        **{
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in (
                ("block_types", (*["ResBlock"] * 3, *["EfficientViTBlock"] * 3)),
                ("qkv_multiscales", ((), (), (), (5,), (5,), (5,))),
            )
        },
    ),
    **dict.fromkeys(("wan-1.3b", "wan-14b"), AutoencoderKLWan),
}  # fmt: skip
"""Likewise."""
