"""Tiny random components of diffusers' pipelines: denoisers of every family, autoencoders, text
encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    CLIPImageProcessor,
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


@contextmanager
def batch_sizes(*denoisers: nn.Module) -> Iterator[list[int]]:
    """The batch size of every call of the denoisers."""
    sizes: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        sizes.append(len(first))

    handles = [d.register_forward_pre_hook(note, with_kwargs=True) for d in denoisers]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


# -- denoisers -----------------------------------------------------------------------------------


def unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    small: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16),
        "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2, "cross_attention_dim": WIDTH,
        "attention_head_dim": 2, "norm_num_groups": 4, "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
    }  # fmt: skip
    torch.manual_seed(seed)
    return UNet2DConditionModel(**small | config).eval()


def _transformer(kind: type[M], **small: Any) -> Callable[..., M]:
    """A function that makes a transformer without a zero, of a seed and of changes to its
    configuration."""

    def make(seed: int = 0, **config: Any) -> M:
        torch.manual_seed(seed)
        return randomise(kind(**small | config))

    return make


LATENTS: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}

sd3_transformer = _transformer(
    SD3Transformer2DModel, **LATENTS, **HEADS, num_layers=3, joint_attention_dim=2 * WIDTH,
    caption_projection_dim=WIDTH, pooled_projection_dim=POOLED, pos_embed_max_size=8,
    qk_norm="rms_norm", dual_attention_layers=(0,),
)  # fmt: skip
pixart_transformer = _transformer(
    PixArtTransformer2DModel, **LATENTS | {"out_channels": 8}, **HEADS, num_layers=2,
    cross_attention_dim=WIDTH, caption_channels=WIDTH, norm_type="ada_norm_single",
    use_additional_conditions=False,
)  # fmt: skip
sana_transformer = _transformer(
    SanaTransformer2DModel, **LATENTS, **HEADS, num_layers=2, num_cross_attention_heads=4,
    cross_attention_head_dim=4, cross_attention_dim=WIDTH, caption_channels=WIDTH,
    qk_norm="rms_norm_across_heads",
)  # fmt: skip
lumina2_transformer = _transformer(
    Lumina2Transformer2DModel, sample_size=8, patch_size=2, in_channels=4, hidden_size=24,
    num_layers=3, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=8,
    axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16), cap_feat_dim=WIDTH,
)  # fmt: skip
wan_transformer = _transformer(
    WanTransformer3DModel, patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
    in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16, ffn_dim=32, num_layers=2,
    rope_max_seq_len=16,
)  # fmt: skip
ltx_transformer = _transformer(
    LTXVideoTransformer3DModel, **HEADS, in_channels=4, out_channels=4, num_layers=2,
    cross_attention_dim=WIDTH, caption_channels=WIDTH,
)  # fmt: skip
qwen_transformer = _transformer(
    QwenImageTransformer2DModel, **HEADS, patch_size=2, in_channels=4, out_channels=1,
    num_layers=3, joint_attention_dim=WIDTH, axes_dims_rope=(4, 2, 2),
)  # fmt: skip
z_image_transformer = _transformer(
    ZImageTransformer2DModel, in_channels=4, dim=16, n_layers=3, n_refiner_layers=1, n_heads=2,
    n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 2, 2], axes_lens=[600, 16, 16],
)  # fmt: skip
aura_flow_transformer = _transformer(
    AuraFlowTransformer2DModel, **LATENTS, **HEADS, num_mmdit_layers=2, num_single_dit_layers=2,
    joint_attention_dim=WIDTH, caption_projection_dim=16, pos_embed_max_size=64,
)  # fmt: skip
flux2_transformer = _transformer(
    Flux2Transformer2DModel, **HEADS, in_channels=4, num_layers=2, num_single_layers=2,
    joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
    guidance_embeds=False,
)  # fmt: skip
chroma_transformer = _transformer(
    ChromaTransformer2DModel, **HEADS, in_channels=4, num_layers=2, num_single_layers=2,
    joint_attention_dim=WIDTH, axes_dims_rope=(4, 2, 2), approximator_num_channels=8,
    approximator_hidden_dim=16, approximator_layers=1,
)  # fmt: skip
cogview4_transformer = _transformer(
    CogView4Transformer2DModel, **LATENTS, **HEADS, num_layers=3, text_embed_dim=WIDTH,
    time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
)  # fmt: skip


# -- autoencoders --------------------------------------------------------------------------------


def _autoencoder(kind: type[M], **config: Any) -> M:
    torch.manual_seed(2)
    return kind(**config).eval()


CONVOLUTIONS: dict[str, Any] = {
    "block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "layers_per_block": 1,
    "norm_num_groups": 2, "sample_size": 16,
}  # fmt: skip
CAUSAL: dict[str, Any] = {
    "base_dim": 3, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False], "latents_mean": [0.1] * 4, "latents_std": [0.9] * 4,
}  # fmt: skip


def autoencoder(**config: Any) -> AutoencoderKL:
    small = CONVOLUTIONS | {"scaling_factor": 0.5, "force_upcast": False}
    return _autoencoder(AutoencoderKL, **small | config)


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """FLUX.2's, two pixels for one latent, with a variance of packed latents."""
    made = _autoencoder(AutoencoderKLFlux2, **CONVOLUTIONS)
    assert made.bn.running_var is not None
    made.bn.running_var.uniform_(0.5, 1.5)
    return made


def video_autoencoder(**config: Any) -> AutoencoderKLWan:
    """Wan's, two pixels for one latent."""
    small = CAUSAL | {"scale_factor_temporal": 4, "scale_factor_spatial": 2}
    return _autoencoder(AutoencoderKLWan, **small | config)


def packed_autoencoder() -> AutoencoderKLQwenImage:
    """Qwen-Image's, two pixels for one latent."""
    return _autoencoder(AutoencoderKLQwenImage, **CAUSAL)


def ltx_autoencoder(**config: Any) -> AutoencoderKLLTXVideo:
    """LTX's, four pixels for one latent, and four frames."""
    blocks: dict[str, Any] = {
        "block_out_channels": (4,) * 4, "layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": (True, True, False, False),
    }  # fmt: skip
    small = {
        "latent_channels": 4, "patch_size": 1, "patch_size_t": 1, "encoder_causal": True,
        "decoder_causal": False, **blocks, **{f"decoder_{k}": v for k, v in blocks.items()},
    }  # fmt: skip
    return _autoencoder(AutoencoderKLLTXVideo, **small | config)


def deep_autoencoder() -> AutoencoderDC:
    """Sana's, four pixels for one latent."""
    blocks = {
        "block_out_channels": (4, 8, 8), "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), ()),
    }  # fmt: skip
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in blocks.items()}
    return _autoencoder(AutoencoderDC, latent_channels=4, attention_head_dim=4, **sides)


# -- texts and images ----------------------------------------------------------------------------


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
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=TOKENS,
        projection_dim=WIDTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config).eval()


def t5_encoder(tokenizer: CLIPTokenizer, kind: type[Any] = T5EncoderModel) -> T5EncoderModel:
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=1, num_heads=2
    )
    return kind(config).eval()


def image_encoder(size: int) -> tuple[CLIPVisionModel, CLIPImageProcessor]:
    """Of square images, with what makes them of this size."""
    torch.manual_seed(11)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        image_size=size, patch_size=8,
    )  # fmt: skip
    sizes = {"height": size, "width": size}
    return CLIPVisionModel(config).eval(), CLIPImageProcessor(size=sizes, crop_size=sizes)


# -- pipelines -----------------------------------------------------------------------------------


def scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
        timestep_spacing="trailing",
    )  # fmt: skip


def sd3_pipeline(**config: Any) -> StableDiffusion3Pipeline:
    """Without its third text encoder, as it may be used; ``config`` is the transformer's."""
    words = tokenizer()
    encoders = [text_encoder(words, 2, CLIPTextModelWithProjection) for _ in range(2)]
    pipe = StableDiffusion3Pipeline(
        transformer=sd3_transformer(**config), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(shift_factor=0.1), text_encoder=encoders[0], tokenizer=words,
        text_encoder_2=encoders[1], tokenizer_2=deepcopy(words), text_encoder_3=None,
        tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_pipeline(**config: Any) -> PixArtSigmaPipeline:
    """``config`` is the transformer's."""
    words = tokenizer()
    pipe = PixArtSigmaPipeline(
        transformer=pixart_transformer(**config), scheduler=scheduler("epsilon"),
        vae=autoencoder(), text_encoder=t5_encoder(words), tokenizer=words,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- families ------------------------------------------------------------------------------------


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
        unet, "epsilon", WIDTH, others=({"block_out_channels": (8, 32)}, {"layers_per_block": 2})
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
