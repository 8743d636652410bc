"""Convert a UNet of diffusers to ComfyUI's single file.

    python -m pilotfish_comfyui.convert FOLDER FILE

``FOLDER`` holds a UNet as diffusers saves it (``config.json`` and safetensors), ``FILE`` goes to
``models/diffusion_models``. ComfyUI reads folders of diffusers for the sizes that it knows; this
needs neither ComfyUI nor those sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from .names import Layout, to_comfyui

PREFIX = "model.diffusion_model."
"""Of the UNet's tensors in a checkpoint of ComfyUI."""
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
"""Fields of diffusers' configuration, and the values that ComfyUI's UNet has a counterpart for."""
BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}


class ConversionError(ValueError):
    """A UNet that ComfyUI's cannot express; the message names every reason."""


def differences(config: Mapping[str, Any]) -> list[str]:
    """What of a UNet of diffusers has no counterpart in ComfyUI's, in words; empty if nothing."""
    found = [
        f"{name}={config[name]!r} (ComfyUI: {' or '.join(map(repr, values))})"
        for name, values in SAME.items()
        if name in config and config[name] not in values
    ]
    widths = list(config["block_out_channels"])
    if any(width % GROUPS for width in widths):
        found.append(f"block_out_channels={widths} (ComfyUI: multiples of {GROUPS})")
    if any(width % widths[0] for width in widths):
        found.append(f"block_out_channels={widths} (ComfyUI: multiples of the first)")
    blocks = {*config["down_block_types"], *config["up_block_types"]} - BLOCKS
    return found + [f"{name} (ComfyUI: {', '.join(sorted(BLOCKS))})" for name in sorted(blocks)]


def convert(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The tensors of a UNet by their names in a checkpoint of ComfyUI.

    Raises:
        ConversionError: ComfyUI's UNet cannot express it.
    """
    if reasons := differences(unet.config):
        raise ConversionError(f"ComfyUI's UNet has no counterpart for {'; '.join(reasons)}")
    names = Layout.of_diffusers(unet).names()
    return {PREFIX + to_comfyui(k, names): v for k, v in unet.state_dict().items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    try:
        tensors = convert(UNet2DConditionModel.from_pretrained(given.folder))
    except ConversionError as error:
        parser.exit(1, f"{error}\n")
    partial = given.file.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"format": "pt"})
    partial.replace(given.file)


if __name__ == "__main__":
    main()
