"""The frozen base in fewer bits, for less memory. Gradients go through it; none are its own.

Layers are replaced one by one, so a device holds no more than the quantised base and one layer.
They keep their names, and a guide that is trained on them fits the base in full precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pilotfish.training.config import ConfigError
from pilotfish.training.fields import Quantization

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that keep their precision in fp8: the backward pass reads their weights after diffusers
has converted them back."""
PACKAGES = {
    "int8": ("bitsandbytes", "pip install 'pilotfish[8bit]'"),
    "nf4": ("bitsandbytes", "pip install 'pilotfish[8bit]'"),
    "int8-torchao": ("torchao", "pip install torchao"),
}  # fmt: skip


def quantize(
    denoiser: Any, kind: Quantization, dtype: torch.dtype, device: torch.device
) -> None:  # fmt: skip
    """Quantise a denoiser in place and move it to a device.

    Args:
        kind: ``fp8``: diffusers' layerwise casting of all but norms, embeddings of positions and
            convolutions. ``nf4``, ``int8``: linear layers by bitsandbytes. ``int8-torchao``:
            linear layers by torchao, weights only.
        dtype: of activations and of all other layers.

    Raises:
        ConfigError: a package is missing.
    """
    denoiser.requires_grad_(False)
    if kind == "fp8":
        denoiser.enable_layerwise_casting(
            torch.float8_e4m3fn, compute_dtype=dtype, skip_modules_classes=CONVOLUTIONS
        )
    elif kind == "int8-torchao":
        ao = _package(kind)
        for layer in _linear_layers(denoiser).values():
            ao.quantize_(layer.to(device), ao.Int8WeightOnlyConfig())
    elif kind != "no":
        bnb = _package(kind)
        for name, layer in _linear_layers(denoiser).items():
            owner, _, leaf = name.rpartition(".")
            made = _by_bitsandbytes(bnb, layer, kind, dtype).to(device)
            _keep_bias(made)
            setattr(denoiser.get_submodule(owner), leaf, made)
    nn.Module.to(denoiser, device)  # diffusers' own method warns


def _package(kind: str) -> Any:
    """The module with the layers or the function of a kind."""
    name, how = PACKAGES[kind]
    try:
        if name == "torchao":
            import torchao.quantization as package
        else:
            import bitsandbytes.nn as package
    except ImportError as error:
        raise ConfigError(f"--base_quantization {kind} needs {name}: {how}") from error
    return package


def _linear_layers(denoiser: Any) -> dict[str, nn.Linear]:
    """By name, but those that diffusers keeps in float32 for precision."""
    kept = set(getattr(denoiser, "_keep_in_fp32_modules", None) or ())
    return {
        name: layer
        for name, layer in denoiser.named_modules()
        if type(layer) is nn.Linear and not kept & set(name.split("."))
    }


def _by_bitsandbytes(bnb: Any, layer: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    """A layer of bitsandbytes, which quantises its weight when it is moved to a device."""
    shape: Any = (layer.in_features, layer.out_features, layer.bias is not None)
    made: Any
    if kind == "nf4":
        made = bnb.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4", device="meta")
        made.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        made.support_avx512bf16_for_cpu = False  # it would store weights in a form of inference
    else:
        made = bnb.Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        made.weight = bnb.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )  # fmt: skip
    made.bias = layer.bias
    found: nn.Module = made.eval()
    return found


def _keep_bias(layer: nn.Module) -> None:
    """Undo after every pass that bitsandbytes casts a bias in place to the dtype of the layer's
    input, which autocast brings to half precision: the base would change."""
    kept: Any = layer.bias
    if kept is None:
        return
    kept = kept.data

    def restore(layer: Any, args: Any, output: Any) -> None:
        if layer.bias.dtype != kept.dtype:
            layer.bias.data = kept.to(layer.bias.device)

    layer.register_forward_hook(restore)
