"""Tiny random components of Stable Diffusion, Stable Diffusion 3, PixArt-Sigma, Sana,
Lumina2 and Wan."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaTransformer2DModel,
    CogView4Transformer2DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
)

from pilotfish.guidance import per_sample
from pilotfish.interface import Refresh, TextConditions

WIDTH = 16
TOKENS = 8
POOLED = 2 * WIDTH
M = TypeVar("M", bound=nn.Module)


def randomise(module: M, seed: int = 4, by: float = 0.1) -> M:
    """Change every parameter of a module, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def clone(module: nn.Module, copies: dict[int, Any] | None = None) -> Any:
    """A module with parameters, buffers and hooks of its own. All else is shared, and so it takes a
    tenth of the time of ``deepcopy``, which most tests would spend there."""
    copies = {} if copies is None else copies
    if id(module) in copies:
        return copies[id(module)]
    made = copies[id(module)] = module.__class__.__new__(module.__class__)
    state = vars(made)
    state.update(vars(module))
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            state[name] = type(value)()
    state["_buffers"] = {k: None if v is None else v.clone() for k, v in module._buffers.items()}
    state["_modules"] = {
        k: None if v is None else clone(v, copies) for k, v in module._modules.items()
    }
    state["_parameters"] = own = {}
    for key, tensor in module._parameters.items():
        if tensor is not None and id(tensor) not in copies:
            copies[id(tensor)] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
        own[key] = None if tensor is None else copies[id(tensor)]
    return made


def unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    plain: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
    }
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**plain, **config}).eval()


def sd3_transformer(seed: int = 0, **config: Any) -> SD3Transformer2DModel:
    small: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 2 * WIDTH,
        "caption_projection_dim": WIDTH, "pooled_projection_dim": POOLED, "pos_embed_max_size": 8,
        "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(SD3Transformer2DModel(**small | config))


def pixart_transformer(seed: int = 0, **config: Any) -> PixArtTransformer2DModel:
    small: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH, "norm_type": "ada_norm_single",
        "use_additional_conditions": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(PixArtTransformer2DModel(**small | config))


def sana_transformer(seed: int = 0, **config: Any) -> SanaTransformer2DModel:
    small: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 4, "cross_attention_dim": WIDTH, "caption_channels": WIDTH,
        "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(SanaTransformer2DModel(**small | config))


def lumina2_transformer(seed: int = 0, **config: Any) -> Lumina2Transformer2DModel:
    small: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 3,
        "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 8,
        "axes_dim_rope": (4, 2, 2), "axes_lens": (300, 16, 16), "cap_feat_dim": WIDTH,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(Lumina2Transformer2DModel(**small | config))


def wan_transformer(seed: int = 0, **config: Any) -> WanTransformer3DModel:
    small: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 2, "rope_max_seq_len": 16,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(WanTransformer3DModel(**small | config))


def video_autoencoder(**config: Any) -> AutoencoderKLWan:
    """Wan's, two pixels for one latent."""
    small: dict[str, Any] = {
        "base_dim": 3, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
        "temperal_downsample": [False], "latents_mean": [0.1] * 4, "latents_std": [0.9] * 4,
        "scale_factor_temporal": 4, "scale_factor_spatial": 2,
    }  # fmt: skip
    torch.manual_seed(2)
    return AutoencoderKLWan(**small | config).eval()


def image_encoder(size: int) -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """Of square images, with what makes them of this size."""
    torch.manual_seed(11)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        image_size=size, patch_size=8,
    )  # fmt: skip
    sizes = {"height": size, "width": size}
    return CLIPVisionModel(config).eval(), CLIPImageProcessorPil(size=sizes, crop_size=sizes)


def ltx_transformer(seed: int = 0, **config: Any) -> LTXVideoTransformer3DModel:
    small: dict[str, Any] = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": WIDTH, "num_layers": 2, "caption_channels": WIDTH,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(LTXVideoTransformer3DModel(**small | config))


def ltx_autoencoder(**config: Any) -> AutoencoderKLLTXVideo:
    """LTX's, four pixels for one latent, and four frames."""
    torch.manual_seed(2)
    sides: dict[str, Any] = {
        f"{side}{name}": value
        for side in ("", "decoder_")
        for name, value in (
            ("block_out_channels", (4,) * 4), ("layers_per_block", (1,) * 5),
            ("spatio_temporal_scaling", (True, True, False, False)),
        )
    }  # fmt: skip
    return AutoencoderKLLTXVideo(
        latent_channels=4, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False,
        **sides | config,
    ).eval()  # fmt: skip


def qwen_transformer(seed: int = 0, **config: Any) -> QwenImageTransformer2DModel:
    small: dict[str, Any] = {
        "patch_size": 2, "in_channels": 4, "out_channels": 1, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 2, 2),
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(QwenImageTransformer2DModel(**small | config))


def packed_autoencoder() -> AutoencoderKLQwenImage:
    """Qwen-Image's, two pixels for one latent."""
    torch.manual_seed(2)
    return AutoencoderKLQwenImage(
        base_dim=3, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[0.9] * 4,
    ).eval()  # fmt: skip


def z_image_transformer(seed: int = 0, **config: Any) -> ZImageTransformer2DModel:
    small: dict[str, Any] = {
        "in_channels": 4, "dim": 16, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": WIDTH, "axes_dims": [4, 2, 2], "axes_lens": [600, 16, 16],
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(ZImageTransformer2DModel(**small | config))


def aura_flow_transformer(seed: int = 0, **config: Any) -> AuraFlowTransformer2DModel:
    small: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
        "num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(AuraFlowTransformer2DModel(**small | config))


def flux2_transformer(seed: int = 0, **config: Any) -> Flux2Transformer2DModel:
    small: dict[str, Any] = {
        "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 3 * WIDTH,
        "timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2), "guidance_embeds": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(Flux2Transformer2DModel(**small | config))


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """FLUX.2's, two pixels for one latent, with a variance of packed latents."""
    torch.manual_seed(2)
    made = AutoencoderKLFlux2(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1,
        norm_num_groups=2, sample_size=16,
    ).eval()  # fmt: skip
    assert made.bn.running_var is not None
    made.bn.running_var.uniform_(0.5, 1.5)
    return made


def chroma_transformer(seed: int = 0, **config: Any) -> ChromaTransformer2DModel:
    small: dict[str, Any] = {
        "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 2, 2),
        "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(ChromaTransformer2DModel(**small | config))


def cogview4_transformer(seed: int = 0, **config: Any) -> CogView4Transformer2DModel:
    small: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "text_embed_dim": WIDTH,
        "time_embed_dim": 8, "condition_dim": 4, "rope_axes_dim": (16, 16),
    }  # fmt: skip
    torch.manual_seed(seed)
    return randomise(CogView4Transformer2DModel(**small | config))


def deep_autoencoder() -> AutoencoderDC:
    """Sana's, four pixels for one latent."""
    torch.manual_seed(2)
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_out_channels", (4, 8, 8)), ("layers_per_block", (1, 1, 1)),
            ("qkv_multiscales", ((), (), ())),
        )
    }  # fmt: skip
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, **sides).eval()


def scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )


def tokenizer() -> CLIPTokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>"]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("c", "a"), ("ca", "t</w>")]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS)


def own_tokenizers(parts: dict[str, Any]) -> dict[str, Any]:
    """The components of a pipeline, for another one that may run in another thread: a tokenizer
    keeps how it last padded, so two threads must not share one."""
    return {k: deepcopy(v) if k.startswith("tokenizer") else v for k, v in parts.items()}


def text_encoder(
    tokenizer: CLIPTokenizer, layers: int = 1, kind: type[Any] = CLIPTextModel
) -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def autoencoder(**config: Any) -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.5,
        force_upcast=False,
        **config,
    ).eval()


def sd3_pipeline(**config: Any) -> StableDiffusion3Pipeline:
    """Without its third text encoder, as it may be used; ``config`` is the transformer's."""
    words = tokenizer()
    encoders = [text_encoder(words, 2, CLIPTextModelWithProjection) for _ in range(2)]
    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(**config),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=encoders[0],
        tokenizer=words,
        text_encoder_2=encoders[1],
        tokenizer_2=deepcopy(words),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_pipeline(**config: Any) -> PixArtSigmaPipeline:
    """``config`` is the transformer's."""
    words = tokenizer()
    torch.manual_seed(3)
    t5 = T5Config(
        vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=1, num_heads=2
    )
    pipe = PixArtSigmaPipeline(
        transformer=pixart_transformer(**config),
        scheduler=scheduler("epsilon"),
        vae=autoencoder(),
        text_encoder=T5EncoderModel(t5).eval(),
        tokenizer=words,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Family:
    """A family of denoisers in tests.

    Attributes:
        denoiser: makes one, of a seed and of changes to its configuration.
        prediction_type: what it predicts.
        text_dim: width of the text's embeddings.
        pooled: width of the pooled text, 0 for none.
        masked: whether text has a mask.
        others: configurations of other shapes.
        shape: of the latents.
    """

    denoiser: Callable[..., Any]
    prediction_type: str
    text_dim: int
    pooled: int = 0
    masked: bool = False
    others: tuple[dict[str, Any], ...] = ()
    shape: tuple[int, ...] = (4, 8, 8)

    def text(self, n: int, length: int = TOKENS, seed: int = 6) -> TextConditions:
        """``n`` random prompts; of a masked one the last tokens do not count."""
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(n, length, self.text_dim, generator=generator)
        pooled = torch.randn(n, self.pooled, generator=generator) if self.pooled else None
        mask = torch.ones(n, length, dtype=torch.long) if self.masked else None
        if mask is not None:
            for i in range(n):
                mask[i, length - 1 - i % 2 :] = 0
        return TextConditions(embeds, pooled, mask)

    def latents(self, n: int, seed: int = 5) -> torch.Tensor:
        r"""(n, \*shape)"""
        return torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(seed))


FAMILIES = {
    "unet": Family(
        unet, "epsilon", WIDTH,
        others=({"block_out_channels": (8, 32)}, {"layers_per_block": 2}),
    ),
    "aura-flow": Family(
        aura_flow_transformer, "flow", WIDTH,
        others=({"num_single_dit_layers": 3}, {"joint_attention_dim": 24}),
    ),
    "flux2": Family(
        flux2_transformer, "flow", 3 * WIDTH,
        others=({"num_single_layers": 3}, {"joint_attention_dim": 24}),
    ),
    "ltx": Family(
        ltx_transformer, "flow", WIDTH, masked=True, shape=(4, 2, 8, 8),
        others=({"num_layers": 3}, {"caption_channels": 24}),
    ),
    "chroma": Family(
        chroma_transformer, "flow", WIDTH, masked=True,
        others=({"num_single_layers": 3}, {"joint_attention_dim": 24}),
    ),
    "cogview4": Family(
        cogview4_transformer, "flow", WIDTH, masked=True,
        others=({"num_layers": 2}, {"text_embed_dim": 24}),
    ),
    "lumina2": Family(
        lumina2_transformer, "flow", WIDTH, masked=True,
        others=({"num_layers": 2}, {"cap_feat_dim": 24}),
    ),
    "pixart": Family(
        pixart_transformer, "epsilon", WIDTH, masked=True,
        others=({"num_layers": 3}, {"caption_channels": 24}),
    ),
    "qwen": Family(
        qwen_transformer, "flow", WIDTH, masked=True,
        others=({"num_layers": 2}, {"joint_attention_dim": 24}),
    ),
    "sana": Family(
        sana_transformer, "flow", WIDTH, masked=True,
        others=({"num_layers": 3}, {"caption_channels": 24}),
    ),
    "z-image": Family(
        z_image_transformer, "flow", WIDTH, masked=True,
        others=({"n_layers": 2}, {"cap_feat_dim": 24}),
    ),
    "wan": Family(
        wan_transformer, "flow", WIDTH, shape=(4, 2, 8, 8),
        others=({"num_layers": 3}, {"text_dim": 24}),
    ),
    "sd3": Family(
        sd3_transformer, "flow", 2 * WIDTH, POOLED,
        others=({"num_layers": 2}, {"pooled_projection_dim": 24}),
    ),
}  # fmt: skip


def refresh(latents: torch.Tensor) -> Refresh:
    """What the samples' last refreshes found; the last sample has had none."""
    random = torch.Generator().manual_seed(4)
    known = torch.ones(len(latents))
    known[-1] = 0
    maps = (
        per_sample(known, latents) * torch.randn(latents.shape, generator=random) for _ in range(4)
    )
    return Refresh(known * 0.95, *maps, known * 0.1, known)
