"""Transformers of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.cldm.mmdit
import comfy.controlnet
import comfy.ops
import comfy.sd
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from kinds import CPU, SIDE, Kind, randomise
from pilotfish_comfyui import small_sd3
from pilotfish_comfyui.convert import main

from recipe.sd3 import new_transformer

small_sd3.register()


@dataclass(frozen=True, eq=False)
class MMDiTKind(Kind):
    """A layout of a transformer.

    Attributes:
        diffusers: its configuration in diffusers; empty for that of the bundled one.
        shift: of the noise levels.
    """

    name: str
    diffusers: dict[str, Any]
    shift: float = 3.0
    prediction = "flow"
    takes_pooled = joint_attention = True
    bound = 1e-4  # of up to 10

    @cached_property
    def denoiser(self) -> SD3Transformer2DModel:
        torch.manual_seed(0)
        made = SD3Transformer2DModel(**self.diffusers) if self.diffusers else new_transformer()
        return randomise(made, 0.05)

    def load(self, dtype: torch.dtype | None = None) -> Any:
        return load(self.denoiser, dtype)

    @property
    def widths(self) -> tuple[int, int]:
        sizes = self.denoiser.config
        return sizes.joint_attention_dim, sizes.pooled_projection_dim

    def new_pipeline(self, vae: AutoencoderKL) -> Any:
        return StableDiffusion3Pipeline(
            vae=vae, text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None,
            tokenizer_2=None, tokenizer_3=None, transformer=self.denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=self.shift),
        )  # fmt: skip

    def values(self) -> tuple[tuple[str, str], torch.Tensor]:
        name = "transformer.transformer_blocks.1.attn.to_v"
        layer = self.loaded.model.diffusion_model.joint_blocks[1].x_block.attn.qkv
        return (f"{name}.lora_A.weight", f"{name}.lora_B.weight"), layer.weight.chunk(3)[2]

    def control(self) -> tuple[Any, int]:
        config = self.loaded.model.model_config.unet_config
        net = comfy.cldm.mmdit.ControlNet(
            **config, num_blocks=2, control_latent_channels=3, operations=comfy.ops.manual_cast
        )
        for tensor in net.state_dict().values():  # ComfyUI leaves them as the memory was
            tensor.zero_()
        net = randomise(net, 0.1)
        return comfy.controlnet.ControlNet(net, load_device=CPU, compression_ratio=1), SIDE


def load(denoiser: SD3Transformer2DModel, dtype: torch.dtype | None = None) -> Any:
    """A model as *Load Diffusion Model* gives it, from the command's file."""
    with TemporaryDirectory() as folder:
        denoiser.save_pretrained(folder)
        file = Path(folder) / "made.safetensors"
        main([folder, str(file)])
        return comfy.sd.load_diffusion_model(str(file), model_options={"dtype": dtype})


BUNDLED = MMDiTKind("bundled", {}, 1.0)
"""As the bundled one: patches of one pixel, more blocks than heads."""
SD3 = MMDiTKind(
    "SD 3",
    {
        "sample_size": SIDE, "num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 48,
        "caption_projection_dim": 128, "pooled_projection_dim": 24, "pos_embed_max_size": 6,
        "in_channels": 16,
    },
)  # fmt: skip
SD35 = MMDiTKind(
    "SD 3.5 medium",
    SD3.diffusers | {
        "num_layers": 3, "num_attention_heads": 3, "caption_projection_dim": 192,
        "qk_norm": "rms_norm", "dual_attention_layers": (0, 1),
    },
)  # fmt: skip
KINDS = (BUNDLED, SD3, SD35)
