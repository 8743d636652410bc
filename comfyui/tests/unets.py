"""UNets of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from kinds import CPU, SIDE, STEPS, Kind, randomise
from pilotfish_comfyui.convert import PREFIX, convert

WIDTH, POOLED = 48, 24


@dataclass(frozen=True, eq=False)
class UNetKind(Kind):
    """A layout of a UNet.

    Attributes:
        diffusers: its configuration in diffusers.
        comfyui: that in ComfyUI.
        supported: what ComfyUI's loader knows of it.
        base: the class of its model in ComfyUI.
    """

    name: str
    prediction: str
    diffusers: dict[str, Any]
    comfyui: dict[str, Any]
    supported: Any
    base: Any = comfy.model_base.BaseModel
    joint_attention = False
    bound = 2e-4  # of up to 80
    widths = WIDTH, POOLED

    @property
    def takes_pooled(self) -> bool:
        return self.base is comfy.model_base.SDXL

    @cached_property
    def denoiser(self) -> UNet2DConditionModel:
        torch.manual_seed(0)
        return randomise(UNet2DConditionModel(**self.diffusers), 0.02)

    def load(self, dtype: torch.dtype | None = None) -> Any:
        dtype = dtype or torch.float32
        config = self.supported(dict(self.comfyui, dtype=dtype))
        config.set_inference_dtype(dtype, None)
        v, eps = comfy.model_base.ModelType.V_PREDICTION, comfy.model_base.ModelType.EPS
        model = self.base(config, model_type=eps if self.prediction == "epsilon" else v, device=CPU)
        model.load_model_weights(convert(self.denoiser), PREFIX)
        return comfy.model_patcher.ModelPatcher(model.eval().requires_grad_(False), CPU, CPU)

    def new_pipeline(self, vae: AutoencoderKL) -> Any:
        scheduler = EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            prediction_type=self.prediction, timestep_spacing="linspace", steps_offset=1,
        )  # fmt: skip
        if self.takes_pooled:
            return StableDiffusionXLPipeline(
                vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
                unet=self.denoiser, scheduler=scheduler, add_watermarker=False,
            )  # fmt: skip
        return StableDiffusionPipeline(
            vae=vae, text_encoder=None, tokenizer=None, unet=self.denoiser, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def first_latents(self, noise: torch.Tensor, pipe: Any) -> torch.Tensor:
        pipe.scheduler.set_timesteps(STEPS)
        most = pipe.scheduler.sigmas[0]  # ComfyUI's first latents have the variance sigma^2 + 1
        return noise * (most**2 + 1).sqrt() / pipe.scheduler.init_noise_sigma

    def values(self) -> tuple[tuple[str, str], torch.Tensor]:
        name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v"
        layer = self.loaded.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_v
        return (f"{name}.lora_down.weight", f"{name}.lora_up.weight"), layer.weight

    def control(self) -> tuple[Any, int]:
        config = {k: v for k, v in self.comfyui.items() if k not in ("out_channels", "legacy")}
        net = comfy.cldm.cldm.ControlNet(**config, num_heads=8, hint_channels=3)
        for parameter in net.parameters():  # ComfyUI leaves them as the memory was
            parameter.data.zero_()
        return comfy.controlnet.ControlNet(randomise(net, 0.2), load_device=CPU), 8 * SIDE


BOTH = {"in_channels": 4, "out_channels": 4}
SD15 = UNetKind(
    "SD 1.5", "epsilon",
    BOTH | {
        "block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": WIDTH,
        "attention_head_dim": 8, "sample_size": SIDE,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    BOTH | {
        "image_size": 32, "model_channels": 32, "num_res_blocks": [2, 2], "channel_mult": [1, 2],
        "transformer_depth": [1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
        "context_dim": WIDTH, "use_spatial_transformer": True, "legacy": False,
        "use_linear_in_transformer": False, "adm_in_channels": None, "dtype": torch.float32,
    },
    comfy.supported_models.SD15,
)  # fmt: skip
SD2 = UNetKind(
    "SD 2", "v_prediction",
    SD15.diffusers | {
        "use_linear_projection": True, "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2), "layers_per_block": 1,
    },
    SD15.comfyui | {
        "use_linear_in_transformer": True, "model_channels": 64, "num_res_blocks": [1, 1],
        "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
    },
    comfy.supported_models.SD20,
)  # fmt: skip
SDXL = UNetKind(
    "SDXL", "epsilon",
    SD2.diffusers | {
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": POOLED + 6 * 256,
    },
    SD2.comfyui | {
        "transformer_depth": [0, 2], "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2,
        "num_classes": "sequential", "adm_in_channels": POOLED + 6 * 256,
    },
    comfy.supported_models.SDXL, comfy.model_base.SDXL,
)  # fmt: skip
KINDS = (SD15, SD2, SDXL)
