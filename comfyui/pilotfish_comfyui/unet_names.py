"""The names of one UNet in diffusers and in ComfyUI.

Both lay out the same network: diffusers by levels (``up_blocks.0.attentions.1``), ComfyUI by one
running number (``output_blocks.1.1``). A guide's signature has the names of diffusers. This file
needs neither library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Block = tuple[bool, ...]
"""For each residual layer of a block, whether an attention layer follows it."""

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Parts of a residual layer: in diffusers, in ComfyUI. Those of attention layers have one name."""
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Layers outside of the blocks."""


@dataclass(frozen=True)
class Layout:
    """Where a UNet has residual and attention layers.

    Attributes:
        down: the blocks of the encoder, from the latents' resolution down.
        middle: of the mid block; empty where there is none.
        up: the blocks of the decoder, as they run.
    """

    down: tuple[Block, ...]
    middle: Block
    up: tuple[Block, ...]

    @classmethod
    def of_diffusers(cls, unet: Any) -> Layout:
        """Of a ``UNet2DConditionModel``."""
        middle = unet.mid_block
        return cls(
            tuple(map(_block, unet.down_blocks)),
            () if middle is None else _block(middle),
            tuple(map(_block, unet.up_blocks)),
        )

    @classmethod
    def of_comfyui(cls, unet: Any) -> Layout:
        """Of a ``UNetModel`` of ComfyUI."""
        middle = [] if unet.middle_block is None else _kinds(unet.middle_block)
        return cls(
            _levels(list(map(_kinds, unet.input_blocks))[1:]),
            tuple(
                middle[i + 1 : i + 2] == ["SpatialTransformer"]
                for i, kind in enumerate(middle)
                if kind == "ResBlock"
            ),
            _levels(map(_kinds, unet.output_blocks)),
        )

    def names(self) -> dict[str, str]:
        """Every residual, attention and resizing layer and those of :data:`ENDS`, by the name in
        diffusers: the name in ComfyUI."""
        return {**ENDS, **dict(self._layers())}

    def _layers(self) -> Iterator[tuple[str, str]]:
        number = 0
        for i, block in enumerate(self.down):
            for j, attends in enumerate(block):
                number += 1
                yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
                if attends:
                    yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            if i < len(self.down) - 1:
                number += 1
                yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
        place = 0
        for j, attends in enumerate(self.middle):
            yield f"mid_block.resnets.{j}", f"middle_block.{place}"
            if attends:
                yield f"mid_block.attentions.{j}", f"middle_block.{place + 1}"
            place += 1 + attends
        number = 0
        for i, block in enumerate(self.up):
            for j, attends in enumerate(block):
                yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
                if attends:
                    yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
                if j == len(block) - 1 and i < len(self.up) - 1:
                    conv = f"output_blocks.{number}.{1 + attends}.conv"
                    yield f"up_blocks.{i}.upsamplers.0.conv", conv
                number += 1


def to_comfyui(name: str, names: Mapping[str, str]) -> str:
    """The name in ComfyUI of a module or tensor of diffusers' UNet.

    Args:
        names: :meth:`Layout.names`.

    Raises:
        KeyError: the layout has no such layer.
    """
    prefix, rest = _split(name, names)
    part, _, last = rest.partition(".")
    rest = ".".join(filter(None, (RESIDUAL.get(part, part), last)))
    return f"{names[prefix]}.{rest}" if rest else names[prefix]


def to_diffusers(name: str, names: Mapping[str, str]) -> str:
    """The name in diffusers of a module or tensor of ComfyUI's UNet; see :func:`to_comfyui`."""
    back = {there: here for here, there in names.items()}
    prefix, rest = _split(name, back)
    if ".resnets." in back[prefix]:
        parts = {there: here for here, there in RESIDUAL.items()}
        part, after = _split(rest, parts) if rest else ("", "")
        rest = ".".join(filter(None, (parts.get(part, part), after)))
    return f"{back[prefix]}.{rest}" if rest else back[prefix]


def _split(name: str, known: Mapping[str, str]) -> tuple[str, str]:
    """The longest known beginning of a dotted name, and the rest."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in known:
            return prefix, ".".join(parts[end:])
    raise KeyError(f"{name} has no counterpart")


def _block(block: Any) -> Block:
    """Of a block of diffusers."""
    attentions = getattr(block, "attentions", None) or ()
    return tuple(j < len(attentions) for j in range(len(block.resnets)))


def _kinds(block: Any) -> list[str]:
    """The classes of the layers in a block of ComfyUI."""
    return [type(layer).__name__ for layer in block]


def _levels(blocks: Any) -> tuple[Block, ...]:
    """Blocks of ComfyUI by levels: a layer that resizes ends one."""
    levels: list[list[bool]] = [[]]
    for kinds in blocks:
        if kinds[0] == "ResBlock":
            levels[-1].append("SpatialTransformer" in kinds)
        if "Downsample" in kinds or "Upsample" in kinds:
            levels.append([])
    return tuple(map(tuple, levels))
