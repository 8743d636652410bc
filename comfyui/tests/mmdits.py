"""One Stable Diffusion 3 transformer in both implementations, and what draws with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.samplers
import comfy.sd
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from pilotfish_comfyui import small_sd3
from pilotfish_comfyui.convert import main
from unets import Prompt, randomise

from pilotfish import bundled
from pilotfish.guides import TinyGuide
from pilotfish.pipelines.loading import load_pipeline
from recipe.sd3 import new_transformer

SIDE = 8
TRAINED = bundled.FOLDER / "sd3"
"""The bundled transformer, where there is one."""
small_sd3.register()


@dataclass(frozen=True, eq=False)
class Kind:
    """A layout of Stable Diffusion 3.

    Attributes:
        shift: of the noise levels.
    """

    name: str
    config: dict[str, Any]
    shift: float = 3.0

    @property
    def channels(self) -> int:
        return int(self.config.get("in_channels", 8))

    @property
    def widths(self) -> tuple[int, int]:
        """Of the text's embeddings and of the pooled text."""
        sizes = transformer(self).config
        return sizes.joint_attention_dim, sizes.pooled_projection_dim


BUNDLED = Kind("bundled", {}, 1.0)
"""As the bundled one: patches of one pixel, more blocks than heads."""
SD3 = Kind(
    "SD 3",
    {
        "sample_size": SIDE, "num_layers": 2, "num_attention_heads": 2, "joint_attention_dim": 48,
        "caption_projection_dim": 128, "pooled_projection_dim": 24, "pos_embed_max_size": 6,
        "in_channels": 16,
    },
)  # fmt: skip
SD35 = Kind(
    "SD 3.5 medium",
    SD3.config | {
        "num_layers": 3, "num_attention_heads": 3, "caption_projection_dim": 192,
        "qk_norm": "rms_norm", "dual_attention_layers": (0, 1),
    },
)  # fmt: skip
KINDS = (BUNDLED, SD3, SD35)


@cache
def transformer(kind: Kind) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    made = SD3Transformer2DModel(**kind.config) if kind.config else new_transformer()
    return randomise(made, 0.05)


def loaded(denoiser: SD3Transformer2DModel) -> Any:
    """A model as *Load Diffusion Model* gives it, from the command's file."""
    with TemporaryDirectory() as folder:
        denoiser.save_pretrained(folder)
        file = Path(folder) / "made.safetensors"
        main([folder, str(file)])
        return comfy.sd.load_diffusion_model(str(file))


@cache
def _loaded(kind: Kind) -> Any:
    return loaded(transformer(kind))


def comfyui_model(kind: Kind) -> Any:
    """A clone, as branches of a workflow have it."""
    return _loaded(kind).clone()


def tiny_guide(kind: Kind, untrained: bool = False, **settings: Any) -> TinyGuide:
    """A guide whose five parts all act; an untrained one changes nothing."""
    return guide_for(transformer(kind), untrained, **settings)


def guide_for(
    denoiser: SD3Transformer2DModel, untrained: bool = False, by: float = 0.05, **settings: Any
) -> TinyGuide:
    torch.manual_seed(1)
    usual = {"rank": 4, "condition_on_negative": True, "uncond_templates": 2}
    made = TinyGuide.for_denoiser(
        denoiser, "flow", trained_on={"name": "small base"}, **usual | settings
    )
    return made.eval() if untrained else randomise(made, by)


@cache
def pipeline(kind: Kind) -> StableDiffusion3Pipeline:
    """A pipeline of diffusers that is given embeddings."""
    vae = AutoencoderKL(
        block_out_channels=(2, 2, 2, 2), norm_num_groups=1, latent_channels=kind.channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        vae=vae, text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None,
        tokenizer_2=None, tokenizer_3=None, transformer=transformer(kind),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=kind.shift),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(kind: Kind, seed: int, n: int = 1, tokens: int = 7) -> Prompt:
    return Prompt.random(seed, n, tokens, kind.widths)


def bundled_pipeline() -> Any:
    """The bundled Stable Diffusion 3; where there is none yet, with random weights, and embeddings
    in place of its text encoders."""
    if not TRAINED.is_dir():
        return pipeline(BUNDLED)
    pipe: Any = load_pipeline(TRAINED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bundled_prompts(pipe: Any) -> list[Prompt]:
    """A prompt and a negative prompt, as its pipeline encodes them."""
    if pipe.text_encoder is None:
        return [prompt(BUNDLED, seed) for seed in (5, 2)]
    encoded = pipe.encode_prompt("red apple", None, None, negative_prompt="owl")
    text, negative, pooled, negative_pooled = (tensor.detach() for tensor in encoded)
    return [Prompt(text, pooled), Prompt(negative, negative_pooled)]


def bundled_guide(pipe: Any) -> TinyGuide:
    """That of the bundled transformer; where there is none yet, a random one."""
    if TRAINED.is_dir() and "sd3-tiny" in bundled.guide_names():
        guide = bundled.load_guide("sd3-tiny")
        assert isinstance(guide, TinyGuide)
        return guide
    return guide_for(pipe.transformer, by=0.02)


def noise(channels: int, n: int = 1) -> torch.Tensor:
    return torch.randn(n, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(9))


def draw_diffusers(
    pipe: Any, positive: Prompt, negative: Prompt, w: float, steps: int, n: int = 1
) -> torch.Tensor:
    """The latents of a call."""
    side = SIDE * pipe.vae_scale_factor
    return pipe(
        prompt_embeds=positive.embeds, pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds=negative.embeds.expand(n, -1, -1),
        negative_pooled_prompt_embeds=negative.pooled.expand(n, -1),
        latents=noise(pipe.transformer.config.in_channels, n), guidance_scale=w, height=side,
        width=side, num_inference_steps=steps, output_type="latent",
    ).images  # fmt: skip


def draw_comfyui(
    model: Any, positive: Any, negative: Any, cfg: float, steps: int = 4, n: int = 1,
    sampler: str = "euler", shape: tuple[int, int] = (SIDE, SIDE),
) -> torch.Tensor:  # fmt: skip
    """The latents of a sampling by the scheduler *normal*, as the denoiser sees them."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    channels = model.model.latent_format.latent_channels
    start = noise(channels, n)[..., : shape[0], : shape[1]]
    sampling = model.get_model_object("model_sampling")
    made = guider.sample(
        start, torch.zeros_like(start), comfy.samplers.sampler_object(sampler),
        comfy.samplers.calculate_sigmas(sampling, "normal", steps), disable_pbar=True, seed=3,
    )  # fmt: skip
    return model.model.process_latent_in(made)
