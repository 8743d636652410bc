"""Layers that take in the text, extrapolated away from the negative prompt: ``a + g (a - a_n)``.

``a`` is a layer's output in the pass, ``a_n`` what it would be with the negative prompt. With
``g = -1`` in every layer that takes in the text the pass is the unconditional one; the encoder of a
UNet is left out.

- Cross-attention (NAG, arXiv 2505.21179, with learned gains): ``a_n`` costs one attention to the
  negative prompt's few tokens; their keys and values are made once a call.
- Modulation: layers that take scale and shift from an embedding of time and pooled text.
- Joint attention: see :mod:`pilotfish.backbones.joint_attention`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.hooks import Hooks


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(N, tokens, width) -> (N, heads, tokens, width / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def cross_attention(
    hooks: Hooks, name: str, layer: Any, negative_states: Any = lambda guided: (None, None),
    *, norm_across_heads: bool = False, reads_images: bool = False,
) -> None:  # fmt: skip
    """Extrapolate a cross-attention layer of diffusers' ``Attention`` class.

    Args:
        name: of the layer; its gain is (N, heads).
        negative_states: of a guided pass, the negative prompt as the layer sees it, (1 or N, L,
            D), and the bias (1 or N, 1, 1, L) that masks it, or None.
        norm_across_heads: whether queries and keys are normalised before they are split into heads.
        reads_images: whether the layer may have keys and values of an image (``add_k_proj``), which
            are those of the negative prompt's output too.
    """
    normed = layer.norm_q is not None
    query_layer = layer.norm_q if normed else layer.to_q

    def query(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
        if guided.extrapolates(name):
            split = normed and not norm_across_heads
            guided.scratch[name] = output if split else split_heads(output, layer.heads)

    def keys_and_values(guided: GuidedPass) -> tuple[torch.Tensor, torch.Tensor, Any]:
        states, bias = negative_states(guided)
        if getattr(layer, "norm_cross", None):
            states = layer.norm_encoder_hidden_states(states)
        key = layer.to_k(states)
        if normed and norm_across_heads:
            key = layer.norm_k(key)
        key = split_heads(key, layer.heads)
        if normed and not norm_across_heads:
            key = layer.norm_k(key)
        return key, split_heads(layer.to_v(states), layer.heads), bias

    def extrapolated(guided: GuidedPass, module: Any, args: Any, kwargs: Any) -> Any:
        q = guided.scratch.pop(name, None)
        if q is None:
            return None
        key, value, bias = guided.cache.made_by(
            layer, lambda: keys_and_values(guided), (layer.to_k, layer.to_v)
        )
        image = [guided.scratch.pop((name, part), None) for part in ("k", "v")] if images else []
        if any(part is None for part in image):
            return None  # the projections are fused; the end of the call reports it
        n = len(q)  # one negative prompt may serve all
        negative = F.scaled_dot_product_attention(
            q, key.expand(n, -1, -1, -1), value.expand(n, -1, -1, -1),
            scale=getattr(layer, "scale", None),
            attn_mask=None if bias is None else bias.to(q.dtype).expand(n, -1, q.shape[2], -1),
        )  # fmt: skip
        if image:
            negative = negative + F.scaled_dot_product_attention(q, *image)
        output = args[0].unflatten(-1, (layer.heads, -1))
        changed = guided.extrapolate(name, output, negative.transpose(1, 2), by_head=True)
        return (changed.flatten(2), *args[1:]), kwargs

    images = reads_images and layer.add_k_proj is not None
    if images:
        for part, module in (("k", layer.norm_added_k), ("v", layer.add_v_proj)):
            hooks.keep(module, (name, part), lambda output: split_heads(output, layer.heads))
    hooks.after(query_layer, query)
    hooks.before(layer.to_out[0], extrapolated)


def up_to_last(names: Sequence[str], extrapolated: Collection[str]) -> list[str]:
    """The layers up to the last that is extrapolated, in running order."""
    last = max((i for i, name in enumerate(names) if name in extrapolated), default=-1)
    return list(names[: last + 1])
