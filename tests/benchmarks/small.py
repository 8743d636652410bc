"""Small shapes for the tests: a UNet, one with SDXL's pooled text and sizes, transformers."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.shapes import SHAPES, Shape

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
SMALL, SMALL_XL = Shape(_CONFIG, side=64), Shape(_CONFIG | _XL, pooled=1280, side=64)
LARGER = Shape(_CONFIG | {"sample_size": 32}, side=256)


def small_transformer(name: str, **layers: int) -> Shape:
    """A published transformer, narrow, with few layers and tokens."""
    shape = SHAPES[name]
    pooled = shape.narrow.get("pooled_projection_dim")
    config = {**shape.config, **shape.narrow, **layers}
    return replace(shape, config=config, tokens=16, pooled=pooled, side=128)


SMALL_SD3 = small_transformer(
    "sd35-medium", num_layers=2, sample_size=16, pos_embed_max_size=18, dual_attention_layers=(0,)
)
SMALL_LUMINA2 = small_transformer("lumina2", num_layers=1, num_refiner_layers=1, sample_size=16)
