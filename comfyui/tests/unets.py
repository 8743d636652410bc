"""One UNet in both implementations, small and random, and what draws with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from pilotfish_comfyui.convert import PREFIX, convert
from pilotfish_comfyui.loading import GuideModule

from pilotfish.guides import TinyGuide

TOKENS, WIDTH, POOLED, SIDE = 7, 48, 24, 8
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Kind:
    """A layout that both implementations express."""

    name: str
    prediction: str
    diffusers: dict[str, Any]
    comfyui: dict[str, Any]
    supported: Any
    model: Any

    @property
    def xl(self) -> bool:
        return self.model is comfy.model_base.SDXL


BOTH = {"in_channels": 4, "out_channels": 4}
SD15 = Kind(
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
    comfy.supported_models.SD15, comfy.model_base.BaseModel,
)  # fmt: skip
SD2 = Kind(
    "SD 2", "v_prediction",
    SD15.diffusers | {
        "use_linear_projection": True, "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2), "layers_per_block": 1,
    },
    SD15.comfyui | {
        "use_linear_in_transformer": True, "model_channels": 64, "num_res_blocks": [1, 1],
        "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
    },
    comfy.supported_models.SD20, comfy.model_base.BaseModel,
)  # fmt: skip
SDXL = Kind(
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


def randomise(module: torch.nn.Module, by: float, seed: int = 4) -> Any:
    """Change every parameter, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


@cache
def diffusers_unet(kind: Kind) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return randomise(UNet2DConditionModel(**kind.diffusers), 0.02)


@cache
def comfyui_weights(kind: Kind) -> Any:
    config = kind.supported(dict(kind.comfyui))
    config.set_inference_dtype(torch.float32, None)
    v = comfy.model_base.ModelType.V_PREDICTION
    eps = comfy.model_base.ModelType.EPS
    model = kind.model(config, model_type=v if kind.prediction != "epsilon" else eps, device=CPU)
    found = convert(diffusers_unet(kind))
    assert set(found) == {PREFIX + k for k in model.diffusion_model.state_dict()}
    model.load_model_weights(found, PREFIX)
    return model.eval().requires_grad_(False)


@cache
def loaded(kind: Kind) -> Any:
    return comfy.model_patcher.ModelPatcher(comfyui_weights(kind), CPU, CPU)


def comfyui_model(kind: Kind) -> Any:
    """A model as ComfyUI's nodes give it: branches of a workflow are clones of one, and keep the
    weights without LoRA in one place."""
    return loaded(kind).clone()


def tiny_guide(kind: Kind, untrained: bool = False, **settings: Any) -> TinyGuide:
    """A guide whose five parts all act; an untrained one changes nothing."""
    unet = diffusers_unet(kind)
    torch.manual_seed(1)
    usual = {"rank": 4, "condition_on_negative": True, "uncond_templates": 2}
    made = TinyGuide.for_denoiser(
        unet, kind.prediction, trained_on={"name": "small base"}, **usual | settings
    )
    return made.eval() if untrained else randomise(made, 0.05)


def on_comfyui(guide: TinyGuide) -> Any:
    """A guide as *Load guide* gives it."""
    return comfy.model_patcher.ModelPatcher(GuideModule(guide), load_device=CPU, offload_device=CPU)


@cache
def pipeline(kind: Kind) -> Any:
    """A pipeline of diffusers that is given embeddings."""
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=kind.prediction, timestep_spacing="linspace", steps_offset=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(2, 2, 2, 2), norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    unet = diffusers_unet(kind)
    if kind.xl:
        pipe = StableDiffusionXLPipeline(
            vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
            unet=unet, scheduler=scheduler, add_watermarker=False,
        )  # fmt: skip
    else:
        pipe = StableDiffusionPipeline(
            vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Prompt:
    """Embeddings of n prompts, as both take them."""

    embeds: torch.Tensor
    pooled: torch.Tensor

    @classmethod
    def random(
        cls, seed: int, n: int = 1, tokens: int = TOKENS, widths: tuple[int, int] = (WIDTH, POOLED)
    ) -> Prompt:
        generator = torch.Generator().manual_seed(seed)
        return cls(
            torch.randn(n, tokens, widths[0], generator=generator),
            torch.randn(n, widths[1], generator=generator),
        )

    def conditioning(self, **more: Any) -> list[Any]:
        """ComfyUI's."""
        return [[self.embeds, {"pooled_output": self.pooled, **more}]]


def noise(n: int = 1) -> torch.Tensor:
    return torch.randn(n, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(9))


def draw_diffusers(
    kind: Kind, pipe: Any, prompt: Prompt, negative: Prompt, w: float, steps: int, n: int = 1
) -> torch.Tensor:
    """The latents of a call."""
    pipe.scheduler.set_timesteps(steps)
    most = pipe.scheduler.sigmas[0]  # ComfyUI's first latents have the variance sigma^2 + 1
    start = noise(n) * (most**2 + 1).sqrt() / pipe.scheduler.init_noise_sigma
    pooled = {
        "pooled_prompt_embeds": prompt.pooled,
        "negative_pooled_prompt_embeds": negative.pooled.expand(n, -1),
        "original_size": (8 * SIDE, 8 * SIDE), "target_size": (8 * SIDE, 8 * SIDE),
    }  # fmt: skip
    return pipe(
        prompt_embeds=prompt.embeds, guidance_scale=w,
        negative_prompt_embeds=negative.embeds.expand(n, -1, -1),
        latents=start, num_inference_steps=steps, output_type="latent", height=8 * SIDE,
        width=8 * SIDE, **(pooled if kind.xl else {}),
    ).images  # fmt: skip


def sigmas(steps: int) -> torch.Tensor:
    """The noise levels of :func:`pipeline` at whole timesteps."""
    scheduler = pipeline(SD15).scheduler
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def draw_comfyui(
    model: Any, positive: Any, negative: Any, cfg: float, steps: int = 4, n: int = 1,
    sampler: str = "euler", guider: Any = None, image: Any = None, mask: Any = None,
) -> torch.Tensor:  # fmt: skip
    """The latents of a sampling, as the denoiser sees them."""
    guider = guider or comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    image = torch.zeros(n, 4, SIDE, SIDE) if image is None else image
    made = guider.sample(
        noise(n), image, comfy.samplers.sampler_object(sampler),
        sigmas(steps), denoise_mask=mask, disable_pbar=True, seed=3,
    )  # fmt: skip
    return model.model.process_latent_in(made)
