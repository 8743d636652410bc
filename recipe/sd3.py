"""Stage ``sd3``: the text encoders and the transformer of a Stable Diffusion 3, on Noto Emoji.

Two CLIP encoders and a transformer are trained together, by flow matching. The format has a T5
encoder as well; this one's output is zero, as where a user leaves T5 out
(``text_encoder_3=None``). The text has no positions in the transformer, so 256 zero tokens, a
pipeline's default, act as one whose attention score is raised by log 256. The transformer is
trained with one, which costs a quarter, and in some of the steps with all.

The transformer is compiled, which takes a fifth off a step and needs a C++ compiler.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from recipe.batches import Batches, DenoiserStage
from recipe.configs import tidy_configs
from recipe.loop import train
from recipe.text import TOKENS

WIDTH = 192
SECOND_WIDTH = 32
"""Of the second CLIP encoder; the first, that of ``base``, has the rest."""
PENULTIMATE = -2
"""The hidden states that the pipeline takes of a CLIP encoder."""
STAGE = DenoiserStage(steps=5200, learning_rate=1e-3, final_begin=1700)
TEXT_LEARNING_RATE = 2e-4
ZERO_TOKENS, EVERY = 256, 32
"""The zero tokens of a pipeline's default call; every so many-th step is trained with them."""


def new_transformer() -> SD3Transformer2DModel:
    """(N, 8, 8, 8) latents, each pixel a token, 10.5 M parameters; heads and norms as in SD
    3.5."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def new_text_encoders(
    base: CLIPTextModel, tokenizer: CLIPTokenizer
) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """(N, 16) token ids -> hidden states of 160 and 32 channels and as wide pooled ones. The first
    begins with the weights of ``base``'s encoder."""
    made = []
    for width in (WIDTH - SECOND_WIDTH, SECOND_WIDTH):
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3,
            num_attention_heads=width // 32,
            max_position_embeddings=TOKENS,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        made.append(CLIPTextModelWithProjection(config))
    first, second = made
    first.text_model.load_state_dict(base.state_dict())
    return first, second


def zero_t5() -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 encoder whose output is zero, and a tokenizer that reads nothing."""
    encoder = T5EncoderModel(
        T5Config(vocab_size=8, d_model=WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    )
    torch.nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    # with no text left the pipeline does not warn that some was cut off
    words.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=ZERO_TOKENS,
    )  # fmt: skip
    return encoder, tokenizer


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Not shifted: 64 tokens need no more steps at high noise."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


class FlowLoss:
    """||v(z_s, s, c) - (noise - z)||^2 on the latents of one style (arXiv 2403.03206, with the
    logit-normal density of s in place of a weight); ``bf16`` is mixed precision."""

    def __init__(self, batches: Batches, *, bf16: bool) -> None:
        self.batches, self.bf16 = batches, bf16

    def __call__(
        self, transformer: SD3Transformer2DModel,
        encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection], step: int,
        generator: torch.Generator,
    ) -> torch.Tensor:  # fmt: skip
        batch = self.batches(step, generator)
        s = batch.time[:, None, None, None]
        noisy = torch.lerp(batch.latents, batch.noise, s)
        zeros = ZERO_TOKENS if step % EVERY == EVERY - 1 else 1
        # with few tokens plain attention takes less time than the fused one on a CPU
        plain = sdpa_kernel(SDPBackend.MATH) if zeros == 1 else nullcontext()
        with plain, torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            made = [encoder(batch.tokens, output_hidden_states=True) for encoder in encoders]
            hidden = torch.cat([x.hidden_states[PENULTIMATE] for x in made], -1)
            prediction = transformer(
                noisy, F.pad(hidden, (0, 0, 0, zeros)),
                torch.cat([x.text_embeds for x in made], -1), 1000 * batch.time,
            ).sample  # fmt: skip
        return F.mse_loss(prediction.float(), batch.noise - batch.latents)


def make_sd3(base: Path, images: Path, work: Path, target: Path, *, bf16: bool) -> None:
    """Train encoders and transformer; save a whole pipeline to ``target`` in half precision.

    Args:
        base: the pipeline of stage ``base``, which gives autoencoder, tokenizer and the first
            encoder's weights.
    """
    torch.manual_seed(STAGE.seed)
    vae = AutoencoderKL.from_pretrained(base / "vae", shift_factor=0.0)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoders = new_text_encoders(CLIPTextModel.from_pretrained(base / "text_encoder"), tokenizer)
    parts = dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=True))
    transformer = new_transformer()
    modules = parts | {"transformer": transformer}
    averages = deepcopy(modules)
    objective = FlowLoss(Batches(vae, tokenizer, images / "noto", STAGE), bf16=bf16)
    compiled = torch.compile(transformer, dynamic=False)
    train(
        work / "sd3", modules,
        lambda step, generator: objective(compiled, encoders, step, generator),
        steps=STAGE.steps, seed=STAGE.seed, averages=averages,
        learning_rate=dict.fromkeys(parts, TEXT_LEARNING_RATE)
        | {"transformer": STAGE.learning_rate},
    )  # fmt: skip
    third, reads_nothing = zero_t5()
    StableDiffusion3Pipeline(
        vae=vae.half(),
        text_encoder=averages["text_encoder"].half(),
        tokenizer=tokenizer,
        text_encoder_2=averages["text_encoder_2"].half(),
        tokenizer_2=tokenizer,
        text_encoder_3=third.half(),
        tokenizer_3=reads_nothing,
        transformer=averages["transformer"].half(),
        scheduler=new_scheduler(),
    ).save_pretrained(target)
    tidy_configs(target)
