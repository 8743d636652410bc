"""What there is in a UNet2DConditionModel: its shape, its features, its layers by name.

Each takes a UNet's configuration or a fingerprint, so that a guide can be built without the
denoiser.
"""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

TEXTS_EMBEDDED = ("text", "text_time")
"""How the text may enter the embedding of the timestep: its hidden states are pooled there, or
it comes pooled, with SDXL's sizes."""


def fingerprint(unet: UNet2DConditionModel, prediction_type: str) -> dict[str, Any]:
    """What must agree for a guide to fit: the shape of the denoiser and what it predicts."""
    config = unet.config
    return {
        "family": type(unet).__name__,
        "in_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": list(config.down_block_types),
        "mid_block_type": config.mid_block_type,
        "up_block_types": list(config.up_block_types),
        "transformer_layers_per_block": config.transformer_layers_per_block,
        "attention_head_dim": config.attention_head_dim,
        "use_linear_projection": config.use_linear_projection,
        "cross_attention_dim": config.cross_attention_dim,
        "addition_embed_type": config.addition_embed_type,
        "prediction_type": prediction_type,
    }


def skip_channels(config: Any) -> list[int]:
    """Channels of the skip features in the order in which the encoder makes them."""
    config = dict(config)
    widths = config["block_out_channels"]
    channels = [widths[0]]
    for i, (width, depth) in enumerate(zip(widths, _depths(config), strict=True)):
        last = i == len(widths) - 1
        channels += [width] * (depth if last else depth + 1)
    return channels


def skip_levels(config: Any) -> list[int]:
    """The resolution level of each skip feature: 0 is the latents' own, each next one half."""
    depths = _depths(dict(config))
    levels = [0]
    for i, depth in enumerate(depths):
        levels += [i] * depth + ([i + 1] if i < len(depths) - 1 else [])
    return levels


def decoder_layers(config: Any) -> dict[str, int]:
    """The decoder's residual and attention layers in the order in which they run: the name of
    each module, and the channels that it makes.
    """
    config = dict(config)
    widths, depths, kinds = config["block_out_channels"], _depths(config), config["up_block_types"]
    blocks = zip(reversed(widths), reversed(depths), kinds, strict=True)
    layers: dict[str, int] = {}
    for i, (width, depth, kind) in enumerate(blocks):
        for j in range(depth + 1):
            layers[f"up_blocks.{i}.resnets.{j}"] = width
            if "CrossAttn" in kind:
                layers[f"up_blocks.{i}.attentions.{j}"] = width
    return layers


def cross_attention_layers(config: Any) -> dict[str, int]:
    """The cross-attention layers of mid block and decoder in the order in which they run: the
    name of each, and its heads.
    """
    config = dict(config)
    blocks = len(config["block_out_channels"])

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) else [value] * blocks

    # diffusers' own naming: what is called the dimension of a head is their number
    heads = each(config["attention_head_dim"])
    depths = each(config["layers_per_block"])
    inner = each(config["transformer_layers_per_block"])
    layers: dict[str, int] = {}

    def add(place: str, level: int) -> None:
        count = inner[level]
        for k in range(count if isinstance(count, int) else count[0]):
            layers[f"{place}.transformer_blocks.{k}.attn2"] = heads[level]

    if "CrossAttn" in (config["mid_block_type"] or ""):
        add("mid_block.attentions.0", blocks - 1)
    for i, kind in enumerate(config["up_block_types"]):
        if "CrossAttn" in kind:
            for j in range(depths[blocks - 1 - i] + 1):
                add(f"up_blocks.{i}.attentions.{j}", blocks - 1 - i)
    return layers


def embedding_layers(config: Any) -> list[str]:
    """The residual layers, in the order in which they run, where the embedding that they take
    holds the text beside the timestep; where it does not, none."""
    config = dict(config)
    if config["addition_embed_type"] not in TEXTS_EMBEDDED:
        return []
    depths, kind = _depths(config), config["mid_block_type"]
    middle = 0 if kind is None else 1 if kind == "UNetMidBlock2D" else 2
    return [
        *(f"down_blocks.{i}.resnets.{j}" for i, depth in enumerate(depths) for j in range(depth)),
        *(f"mid_block.resnets.{j}" for j in range(middle)),
        *(
            f"up_blocks.{i}.resnets.{j}"
            for i, depth in enumerate(reversed(depths))
            for j in range(depth + 1)
        ),
    ]


def _depths(config: dict[str, Any]) -> list[int]:
    """Layers of each block of the encoder; the decoder's have one more."""
    depths = config["layers_per_block"]
    if isinstance(depths, int):
        return [depths] * len(config["block_out_channels"])
    return list(depths)
