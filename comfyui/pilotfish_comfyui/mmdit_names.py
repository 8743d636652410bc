"""The names of one Stable Diffusion 3 transformer in diffusers and in ComfyUI.

ComfyUI has one projection to queries, keys and values where diffusers has three, and shift and
scale in the other order in two kinds of layers. This file needs neither library.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "attn": "x_block.attn",
}
"""Layers of a block: in diffusers, in ComfyUI."""
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
"""Projections of a block: in ComfyUI, and the three of diffusers."""
ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "pos_embed.pos_embed": "pos_embed",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
"""Layers outside of the blocks."""


def to_comfyui(name: str) -> str:
    """The name in ComfyUI of a module of diffusers' transformer.

    Raises:
        KeyError: it has no counterpart.
    """
    block, number, rest = _split(name)
    if not block:
        return ENDS[rest]
    return f"joint_blocks.{number}.{BLOCK[rest]}" if rest else f"joint_blocks.{number}"


def _split(name: str) -> tuple[str, str, str]:
    """``transformer_blocks``, a number, and the name inside that block; two empty ones and the
    whole name outside of the blocks."""
    block, _, rest = name.partition(".")
    if block != "transformer_blocks":
        return "", "", name
    number, _, rest = rest.partition(".")
    return block, number, rest


def tensors_to_comfyui(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of diffusers' transformer by their names in ComfyUI, in its layout.

    Raises:
        KeyError: one has no counterpart.
    """
    places = {part: whole for whole, parts in FUSED.items() for part in parts}
    last = max(int(_split(name)[1] or 0) for name in tensors)
    swapped = {"norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        _, number, rest = _split(module)
        if name in ENDS:
            found[ENDS[name]] = tensor
        elif rest in places:
            whole = places[rest]
            if rest == FUSED[whole][0]:
                parts = (f"transformer_blocks.{number}.{part}.{kind}" for part in FUSED[whole])
                fused = torch.cat([tensors[part] for part in parts])
                found[f"joint_blocks.{number}.{whole}.{kind}"] = fused
        else:
            made = torch.cat(tensor.chunk(2)[::-1]) if module in swapped else tensor
            found[f"{to_comfyui(module)}.{kind}"] = made
    return found
