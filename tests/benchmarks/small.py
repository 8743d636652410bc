"""Small shapes for the tests: a UNet, and one with SDXL's pooled text and sizes."""

from __future__ import annotations

from benchmarks.shapes import Shape

_CONFIG = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}  # fmt: skip
_XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 1280,
}  # fmt: skip
SMALL, SMALL_XL = Shape(_CONFIG), Shape(_CONFIG | _XL)
LARGER = Shape(_CONFIG | {"sample_size": 32})
