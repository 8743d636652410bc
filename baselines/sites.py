"""Where rivals act in a denoiser: its modules by name, with their sizes."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.attention_processor import Attention
from torch import nn


def cross_attentions(denoiser: nn.Module) -> dict[str, int]:
    """Every cross-attention: name -> channels of what it makes."""
    return {
        name: module.out_dim
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
    }


def weights(denoiser: nn.Module, endings: Sequence[str] = ("",)) -> dict[str, list[int]]:
    """Every linear and convolutional layer whose name has one of the endings: name -> shape of
    its weight, and for a convolution stride and padding: (out, in) or (out, in, k, k, s, p)."""
    found: dict[str, list[int]] = {}
    for name, module in denoiser.named_modules():
        if not any(name.endswith(e) for e in endings):
            continue
        if isinstance(module, nn.Linear):
            found[name] = list(module.weight.shape)
        elif isinstance(module, nn.Conv2d):
            found[name] = [*module.weight.shape, module.stride[0], int(module.padding[0])]
    return found


def dotless(name: str) -> str:
    """A module's name as a key of ``nn.ModuleDict``, which knows no dots."""
    return name.replace(".", "/")
