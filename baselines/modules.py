"""Modules of a denoiser by name, with their sizes."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.attention_processor import Attention
from torch import nn


def cross_attentions(denoiser: nn.Module) -> dict[str, int]:
    """Output channels of every cross-attention, by name."""
    return {
        name: module.out_dim
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2")
    }


def weight_shapes(denoiser: nn.Module, endings: Sequence[str] = ("",)) -> dict[str, list[int]]:
    """Weight shapes of the linear and convolutional layers whose names have one of the endings:
    [out, in], or [out, in, k, k, stride, padding]."""
    found: dict[str, list[int]] = {}
    for name, module in denoiser.named_modules():
        if not any(name.endswith(e) for e in endings):
            continue
        if isinstance(module, nn.Linear):
            found[name] = list(module.weight.shape)
        elif isinstance(module, nn.Conv2d):
            found[name] = [*module.weight.shape, module.stride[0], int(module.padding[0])]
    return found


def key(name: str) -> str:
    """A module's name as a key of ``nn.ModuleDict``, which allows no dots."""
    return name.replace(".", "/")
