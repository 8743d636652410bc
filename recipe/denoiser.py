"""Stage ``base``: text encoder and UNet, trained together on Noto Emoji.

Some captions are wrong on purpose (``wrong_captions``): that of another image of the same
category. Captions from the web are as loose, and a small model trained on clean captions alone
would hardly need guidance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pilotfish.data.images import from_pixels, load_images
from recipe.augment import Restyle, affine
from recipe.loop import train
from recipe.vocabulary import COLOURS, captions

WIDTH = 160
TOKENS = 16


@dataclass(frozen=True)
class BaseStage:
    """How the base is trained.

    Attributes:
        drop: share of empty prompts, for the unconditional prediction.
        wrong_captions: share of captions taken from another image of the category.
        views: latents of affine views of each image; the first is the image itself.
        final_views: of these, those used from step ``final_begin`` on. Many views first
            generalise; few later sharpen.
    """

    steps: int = 7000
    batch: int = 64
    learning_rate: float = 8e-4
    drop: float = 0.1
    wrong_captions: float = 0.3
    views: int = 24
    final_begin: int = 2000
    final_views: int = 3
    seed: int = 0


def new_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make one token of every word of ``texts``."""
    words = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    split = [word for text in texts for word in text.split()]
    words.train_from_iterator(split, trainer)
    model = json.loads(words.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokens = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


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


@torch.no_grad()
def latent_views(
    vae: AutoencoderKL, folder: Path, views: int, seed: int, restyle: Restyle = lambda x: x
) -> torch.Tensor:
    """(N, views, C, h, w) latents of affine views; the first view is the image itself."""
    pixels = restyle(from_pixels(load_images(folder).pixels))
    generator = torch.Generator().manual_seed(seed)
    made = [pixels] + [affine(pixels, generator) for _ in range(views - 1)]
    latents = [torch.cat([vae.encode(x).latent_dist.mean for x in m.split(64)]) for m in made]
    return torch.stack(latents, 1) * vae.config.scaling_factor


def sample_timesteps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal timesteps, a fifth of them uniform."""
    middle = torch.sigmoid(torch.randn(n, generator=generator))
    flat = torch.rand(n, generator=generator)
    uniform = torch.rand(n, generator=generator) < 0.2
    return (torch.where(uniform, flat, middle) * 1000).long().clamp(0, 999)


def categories_of(folder: Path) -> list[str]:
    """The category of every image, in the order of ``load_images``."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line)["category"] for line in lines]


class DenoisingLoss:
    """||v(z_t, t, c) - v*||^2 on the latents of one style; ``bf16`` is mixed precision."""

    def __init__(
        self, latents: torch.Tensor, tokens: torch.Tensor, categories: Sequence[str],
        empty: torch.Tensor, stage: BaseStage, *, bf16: bool,
    ) -> None:  # fmt: skip
        self.latents, self.tokens, self.empty, self.stage = latents, tokens, empty, stage
        self.bf16 = bf16
        self.scheduler = new_scheduler()
        members: dict[str, list[int]] = {}
        for i, category in enumerate(categories):
            members.setdefault(category, []).append(i)
        self.neighbours = [torch.tensor(members[c]) for c in categories]

    def __call__(
        self,
        unet: UNet2DConditionModel,
        encoder: CLIPTextModel,
        step: int,
        generator: torch.Generator,
    ) -> torch.Tensor:
        n = self.stage.batch
        views = self.stage.views if step < self.stage.final_begin else self.stage.final_views

        def rand() -> torch.Tensor:
            return torch.rand(n, generator=generator)

        pick = torch.randint(len(self.latents), (n,), generator=generator)
        view = torch.randint(views, (n,), generator=generator)
        z0 = self.latents[pick, view]
        swap = (rand() < self.stage.wrong_captions).tolist()
        captions_of = [
            int(near[torch.randint(len(near), (1,), generator=generator)]) if s else int(i)
            for i, s, near in zip(pick, swap, [self.neighbours[i] for i in pick], strict=True)
        ]
        tokens = self.tokens[captions_of]
        tokens = torch.where((rand() < self.stage.drop)[:, None], self.empty, tokens)
        t = sample_timesteps(n, generator)
        noise = torch.randn(z0.shape, generator=generator)
        zt = self.scheduler.add_noise(z0, noise, t).contiguous(memory_format=torch.channels_last)
        target = self.scheduler.get_velocity(z0, noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            made = unet(zt, t, encoder(tokens)[0]).sample
        return F.mse_loss(made.float(), target)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """(N, 16) token ids, padded as the pipeline pads."""
    ids: torch.Tensor = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def make_base(
    images: Path, vae: Path, work: Path, target: Path, stage: BaseStage, *, bf16: bool
) -> None:
    """Train text encoder and UNet; save a whole pipeline to ``target`` in half precision."""
    torch.manual_seed(stage.seed)
    autoencoder = AutoencoderKL.from_pretrained(vae)
    folder = images / "noto"
    tokenizer = new_tokenizer([*captions(), *COLOURS, "with a and of"])
    encoder, unet = new_text_encoder(tokenizer), new_unet().to(memory_format=torch.channels_last)
    averages = {"text_encoder": deepcopy(encoder), "unet": deepcopy(unet)}
    objective = DenoisingLoss(
        latent_views(autoencoder, folder, stage.views, stage.seed),
        tokenize(tokenizer, load_images(folder).captions),
        categories_of(folder), tokenize(tokenizer, [""]), stage, bf16=bf16,
    )  # fmt: skip
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
    # transformers loads in the precision that the configuration names, diffusers in float32
    config = target / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
