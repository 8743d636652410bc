"""Stage ``base``: text encoder and UNet of a Stable Diffusion, trained together on Noto Emoji."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipe.batches import Batches, DenoiserStage
from recipe.configs import name_text_model, tidy_configs
from recipe.loop import train
from recipe.text import TOKENS, new_tokenizer
from recipe.vocabulary import COLOURS, captions

WIDTH = 160


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """(N, 16) token ids -> (N, 16, 160) encoder hidden states, 1.2 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=5,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """(N, 8, 8, 8) latents, Stable Diffusion's layers on one level, 7.0 M parameters.

    A second level at 4x4 would have most of the weights and little arithmetic. A pass would then
    cost about the same for any batch, and the cost of the second pass could not be measured.
    """
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(176,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


class DenoisingLoss:
    """||v(z_t, t, c) - v*||^2 on the latents of one style; ``bf16`` is mixed precision."""

    def __init__(self, batches: Batches, *, bf16: bool) -> None:
        self.batches, self.bf16, self.scheduler = batches, bf16, new_scheduler()

    def __call__(
        self, unet: UNet2DConditionModel, encoder: CLIPTextModel, step: int,
        generator: torch.Generator,
    ) -> torch.Tensor:  # fmt: skip
        batch = self.batches(step, generator)
        t = (batch.time * 1000).long().clamp(0, 999)
        zt = self.scheduler.add_noise(batch.latents, batch.noise, t)
        zt = zt.contiguous(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(batch.latents, batch.noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            made = unet(zt, t, encoder(batch.tokens)[0]).sample
        return F.mse_loss(made.float(), target)


def make_base(
    images: Path, vae: Path, work: Path, target: Path, stage: DenoiserStage, *, bf16: bool
) -> None:
    """Train text encoder and UNet; save a whole pipeline to ``target`` in half precision."""
    torch.manual_seed(stage.seed)
    autoencoder = AutoencoderKL.from_pretrained(vae)
    tokenizer = new_tokenizer([*captions(), *COLOURS, "with a and of"])
    encoder, unet = new_text_encoder(tokenizer), new_unet().to(memory_format=torch.channels_last)
    averages = {"text_encoder": deepcopy(encoder), "unet": deepcopy(unet)}
    batches = Batches(autoencoder, tokenizer, images / "noto", stage)
    objective = DenoisingLoss(batches, bf16=bf16)
    train(
        work / "base", {"text_encoder": encoder, "unet": unet},
        lambda step, generator: objective(unet, encoder, step, generator),
        steps=stage.steps, learning_rate=stage.learning_rate, seed=stage.seed, averages=averages,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=autoencoder.half(),
        text_encoder=averages["text_encoder"].half(),
        tokenizer=tokenizer,
        unet=averages["unet"].to(memory_format=torch.contiguous_format).half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(target)
    tidy_configs(target)
    name_text_model(target / "text_encoder")
