"""Convert a UNet, or a transformer of Stable Diffusion 3, of diffusers to ComfyUI's single file.

    python -m pilotfish_comfyui.convert FOLDER FILE

``FOLDER`` holds a denoiser as diffusers saves it (``config.json`` and safetensors), ``FILE`` goes
to ``models/diffusion_models``. ComfyUI reads folders of diffusers for the sizes that it knows; this
needs neither ComfyUI nor those sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file

from .mmdit_names import tensors_to_comfyui
from .unet_names import Layout, to_comfyui

PREFIX = "model.diffusion_model."
"""Of the denoiser's tensors in a checkpoint of ComfyUI."""
GROUPS = 32
"""Of every group normalisation in ComfyUI's UNet."""
SAME = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "norm_eps": (1e-5,),
    "norm_num_groups": (GROUPS,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
"""Fields of a UNet's configuration in diffusers, and the values that ComfyUI's has a counterpart
for."""
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
SAME_OF_TRANSFORMER = {"attention_head_dim": (64,), "qk_norm": (None, "rms_norm")}
"""The same of a transformer's."""


class ConversionError(ValueError):
    """A denoiser that ComfyUI's cannot express; the message names every reason."""


def differences(config: Mapping[str, Any]) -> list[str]:
    """What of a UNet of diffusers has no counterpart in ComfyUI's, in words; empty if nothing."""
    found = _unlike(config, SAME)
    widths = list(config["block_out_channels"])
    if any(width % GROUPS for width in widths):
        found.append(f"block_out_channels={widths} (ComfyUI: multiples of {GROUPS})")
    if any(width % widths[0] for width in widths):
        found.append(f"block_out_channels={widths} (ComfyUI: multiples of the first)")
    blocks = {*config["down_block_types"], *config["up_block_types"]} - BLOCKS
    return found + [f"{name} (ComfyUI: {', '.join(sorted(BLOCKS))})" for name in sorted(blocks)]


def convert(denoiser: UNet2DConditionModel | SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """The tensors of a denoiser by their names in a checkpoint of ComfyUI.

    Raises:
        ConversionError: ComfyUI's denoiser cannot express it.
    """
    if isinstance(denoiser, SD3Transformer2DModel):
        _refuse("transformer", _unlike(denoiser.config, SAME_OF_TRANSFORMER))
        found = tensors_to_comfyui(denoiser.state_dict())
    elif isinstance(denoiser, UNet2DConditionModel):
        _refuse("UNet", differences(denoiser.config))
        names = Layout.of_diffusers(denoiser).names()
        found = {to_comfyui(k, names): v for k, v in denoiser.state_dict().items()}
    else:
        raise ConversionError(
            f"{type(denoiser).__name__} cannot be converted; UNet2DConditionModel and "
            "SD3Transformer2DModel can"
        )
    return {PREFIX + name: tensor for name, tensor in found.items()}


def _unlike(config: Mapping[str, Any], same: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{name}={config[name]!r} (ComfyUI: {' or '.join(map(repr, values))})"
        for name, values in same.items()
        if name in config and config[name] not in values
    ]


def _refuse(what: str, reasons: list[str]) -> None:
    if reasons:
        raise ConversionError(f"ComfyUI's {what} has no counterpart for {'; '.join(reasons)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line, or these arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    given = parser.parse_args(arguments)
    try:
        tensors = convert(AutoModel.from_pretrained(str(given.folder)))
    except ConversionError as error:
        parser.exit(1, f"{error}\n")
    partial = given.file.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"format": "pt"})
    partial.replace(given.file)


if __name__ == "__main__":
    main()
