"""Diffusers' pipelines on tiny random components, each with what its call needs beside a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.utils import is_ftfy_available
from PIL import Image
from transformers import CLIPTextModelWithProjection

from pilotfish import Guide, TinyGuide
from pilotfish.backbones import (
    AuraFlowDiTBackbone,
    Backbone,
    ChromaDiTBackbone,
    Flux2DiTBackbone,
    LTXBackbone,
    QwenDiTBackbone,
    VideoDiTBackbone,
    ZImageDiTBackbone,
)
from tests import components, editing
from tests.pipelines.specs import CHANNELS, KLEIN_TEXT, PIPELINES, SIDE, SQUARE, TEXT

if not is_ftfy_available():  # which Wan's other pipelines ask
    pipeline_wan_i2v.prompt_clean = str.strip

PROMPTS = ("cat", "a bee")


@dataclass
class Pipeline:
    """A pipeline of diffusers and the rest of its call.

    Attributes:
        pipe: the pipeline.
        images: tensors of its call, one row for each of the PROMPTS; or lists of images to edit,
            or one image for all.
        call: other arguments.
    """

    pipe: Any
    images: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def component(self) -> str:
        """Name of the denoiser among the pipeline's components."""
        return "unet" if "unet" in self.pipe.config else "transformer"

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.component)

    @denoiser.setter
    def denoiser(self, denoiser: Any) -> None:
        setattr(self.pipe, self.component, denoiser)

    @property
    def denoisers(self) -> list[Any]:
        """All of them."""
        second = getattr(self.pipe, "transformer_2", None)
        return [self.denoiser, *([] if second is None else [second])]

    def latents(
        self, prompt: str | Sequence[str] | None = PROMPTS, guidance_scale: float = 4.0, **call: Any
    ) -> torch.Tensor:
        """The final latents, from fixed noise."""
        rows = 1 if isinstance(prompt, str) else len(PROMPTS)
        given: dict[str, Any] = {
            "prompt": prompt if prompt is None or isinstance(prompt, str) else list(prompt),
            "guidance_scale": guidance_scale,
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(5),
            "output_type": "latent",
        }
        if "Qwen" in type(self.pipe).__name__:
            given["true_cfg_scale"] = given.pop("guidance_scale")
            if "negative_prompt_embeds" not in call:
                given["negative_prompt"] = [" "] * rows
        if "ZImage" in type(self.pipe).__name__:  # whose scale is one less
            given["guidance_scale"] -= 1
        if "Klein" in type(self.pipe).__name__ and call.get("negative_prompt"):
            given["negative_prompt_embeds"] = self.encoded(call.pop("negative_prompt"))
        images = {
            name: image if isinstance(image, Image.Image) else image[:rows]
            for name, image in self.images.items()
        }
        torch.manual_seed(0)  # some pipelines encode control images without their generator
        with editing.small_images(self.pipe):
            return self.pipe(**(given | images | self.call | call))[0]

    @torch.no_grad()
    def encoded(self, texts: list[str], **call: Any) -> torch.Tensor:
        """What FLUX.2's pipeline makes of texts. It takes a negative prompt as embeddings alone."""
        made: torch.Tensor = self.pipe.encode_prompt(texts, **KLEIN_TEXT, **call)[0]
        return made

    def batches(self) -> AbstractContextManager[list[int]]:
        """The batch size of every call of the denoiser."""
        return components.batch_sizes(*self.denoisers)

    def hooks(self) -> int:
        """Hooks on the denoisers."""
        modules = [m for denoiser in self.denoisers for m in denoiser.modules()]
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@cache
def _tokenizer() -> Any:
    return components.tokenizer()


_MAKERS: dict[str, Callable[[], Any]] = {
    "text_encoder": lambda: components.text_encoder(_tokenizer(), 2),
    "text_encoder_2": lambda: components.text_encoder(_tokenizer(), 2, CLIPTextModelWithProjection),
    "t5": lambda: components.t5_encoder(_tokenizer()),
    "t5 with images": lambda: components.t5_encoder(_tokenizer(), editing.TextEncoder),
    "vae": components.autoencoder,
    "vae of SD3": lambda: components.autoencoder(latent_channels=CHANNELS, shift_factor=0.1),
    "vae of Chroma": lambda: components.autoencoder(shift_factor=0.1),
    "vae of Sana": components.deep_autoencoder,
    "vae of Qwen": components.packed_autoencoder,
    "vae of Flux2Klein": components.flux2_autoencoder,
    "vae of LTX": components.ltx_autoencoder,
    "vae of Wan": components.video_autoencoder,
    "vae of Wan, from images": lambda: components.video_autoencoder(
        temperal_downsample=[True], scale_factor_temporal=2
    ),
}


@cache
def _part(name: str) -> Any:
    """A component that pipelines share."""
    return _MAKERS[name]()


def shared(name: str, alone: bool = False) -> dict[str, Any]:
    """What a pipeline is made of, beside its denoiser and scheduler; made anew, if it is to stand
    alone."""
    spec = PIPELINES[name]
    family, part = spec.family, _part.__wrapped__ if alone else _part
    vae = f"vae of {family}"
    made: dict[str, Any] = {
        "vae": part(vae if vae in _MAKERS else "vae"), "tokenizer": _tokenizer(),
    }  # fmt: skip
    if family in ("ZImage", "Flux2Klein"):
        made["tokenizer"] = copy.deepcopy(_tokenizer())
        made["tokenizer"].chat_template = "{{ messages[0]['content'] }}"
    encoder = {"SD": "text_encoder", "SDXL": "text_encoder", "SD3": "text_encoder_2"}
    made["text_encoder"] = part(encoder.get(family, "t5"))
    if family in ("SDXL", "SD3"):
        made |= {"tokenizer_2": _tokenizer(), "text_encoder_2": part("text_encoder_2")}
    if family == "SD3":
        made |= {"text_encoder_3": None, "tokenizer_3": None}
    if family == "SD":
        made |= {"feature_extractor": None}
        if "Depth" in spec.pipeline:
            made |= {"depth_estimator": None}
        else:
            made |= {"safety_checker": None, "requires_safety_checker": False}
    if "Edit" in spec.pipeline:
        processor = editing.Processor(made["tokenizer"])
        made |= {"text_encoder": part("t5 with images"), "processor": processor}
    if "ImageToVideo" in spec.pipeline:
        image_encoder, processor = components.image_encoder(SIDE)
        made |= {
            "vae": part("vae of Wan, from images"), "image_encoder": image_encoder,
            "image_processor": processor,
        }  # fmt: skip
    return made | (copy.deepcopy(_helper(name)) if alone else _helper(name))


@cache
def _denoiser(name: str, seed: int = 0) -> Any:
    return new_denoiser(name, seed)


def new_denoiser(name: str, seed: int = 0, **config: Any) -> Any:
    """One for the pipeline, with changes to its configuration."""
    spec = PIPELINES[name]
    config = spec.denoiser | config
    if spec.component == "transformer":
        known = {"ZImage": "z_image", "AuraFlow": "aura_flow", "Flux2Klein": "flux2"}
        kind = known.get(spec.family, spec.family.lower())
        return getattr(components, f"{kind}_transformer")(seed, **config)
    xl = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + components.WIDTH,
        "cross_attention_dim": 2 * components.WIDTH,  # of two text encoders side by side
        "use_linear_projection": True, "transformer_layers_per_block": [1, 2],
    }  # fmt: skip
    plain = {"addition_embed_type": None}
    return components.unet(**(xl if spec.family == "SDXL" else plain) | config)


@cache
def _helper(name: str) -> dict[str, Any]:
    helper = PIPELINES[name].helper
    return {helper[0]: helper[1](_denoiser(name))} if helper else {}


def scheduler(name: str) -> Any:
    """A fresh one."""
    spec = PIPELINES[name]
    if spec.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return components.scheduler(spec.prediction_type)


def guide(
    name: str, trained: bool = True, kind: type[Guide] = TinyGuide, seed: int = 3, **settings: Any
) -> Guide:
    """One for the pipeline's denoiser; trained, every parameter of it has moved."""
    if settings:
        return _new_guide(name, trained, kind, seed, **settings)
    torch.manual_seed(seed)  # for what a test draws after it
    return components.clone(_guide(name, trained, kind, seed))


@cache
def _guide(name: str, trained: bool, kind: type[Guide], seed: int) -> Guide:
    """One with all of its parts, to be cloned: that takes a fraction of the time."""
    parts = {"condition_on_negative": True, "uncond_templates": 2} if kind is TinyGuide else {}
    return _new_guide(name, trained, kind, seed, **parts)


def _new_guide(name: str, trained: bool, kind: type[Guide], seed: int, **settings: Any) -> Guide:
    torch.manual_seed(seed)
    spec = PIPELINES[name]
    made = kind.for_denoiser(_denoiser(name), spec.prediction_type, **settings)
    return components.randomise(made, seed, 0.05) if trained else made.eval()


def build(name: str, pipeline: str | None = None, alone: bool = False, **parts: Any) -> Pipeline:
    """A fresh one, with a denoiser of its own.

    Args:
        pipeline: another class.
        alone: share no component with others.
        parts: others of its components.
    """
    spec = PIPELINES[name]
    others = components.own_tokenizers(shared(name, alone)) if alone else shared(name)
    own: dict[str, Any] = {"scheduler": scheduler(name)}
    if spec.component not in parts:
        own[spec.component] = components.clone(_denoiser(name))
    if spec.boundary_ratio is not None:
        own |= {"transformer_2": components.clone(_denoiser(name, 1)),
                "boundary_ratio": spec.boundary_ratio}  # fmt: skip
    pipe = getattr(diffusers, pipeline or spec.pipeline)(**(others | own | parts))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    channels = {"mask_image": (1,), "control_mask": (1,), "depth_map": ()}
    images: dict[str, Any] = {
        what: torch.rand(len(PROMPTS), *channels.get(what, (3,)), SIDE, SIDE, generator=generator)
        for what in spec.images
    }
    if "Edit" in spec.pipeline or "ImageToVideo" in spec.pipeline:
        images = {what: VaeImageProcessor.pt_to_numpy(image) for what, image in images.items()}
        images = {what: VaeImageProcessor.numpy_to_pil(image) for what, image in images.items()}
    if "ImageToVideo" in spec.pipeline:
        images = {what: image[0] for what, image in images.items()}
    return Pipeline(pipe, images, spec.call)


def small(name: str, **settings: Any) -> tuple[Pipeline, Guide]:
    """A pipeline to be compiled, which takes a second for every few layers, and a trained guide:
    a UNet has one level."""
    spec = PIPELINES[name]
    config: dict[str, Any] = {}
    if spec.component == "unet":
        config = {
            "block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        }  # fmt: skip
    if spec.family == "SDXL":
        config["transformer_layers_per_block"] = [1]
    denoiser = new_denoiser(name, **config)
    settings = {"condition_on_negative": True} | settings
    torch.manual_seed(3)
    made = TinyGuide.for_denoiser(denoiser, spec.prediction_type, **settings)
    return build(name, **{spec.component: denoiser}), components.randomise(made, 3, 0.05)


def without_bins(pipeline: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a pipeline class without what is that of full-size models: bins of sizes, and
    default sizes."""
    call: Any = pipeline.__call__
    small: dict[str, Any] = {}
    if "use_resolution_binning" in signature(call).parameters:
        small = {"use_resolution_binning": False}
    if pipeline is diffusers.SanaPipeline:
        small |= {"height": 2 * SIDE, "width": 2 * SIDE}
    sized: dict[type, tuple[type[Backbone], tuple[int, ...], dict[str, Any]]] = {
        diffusers.ZImagePipeline: (ZImageDiTBackbone, (4, 8, 8), {}),
        diffusers.AuraFlowPipeline: (AuraFlowDiTBackbone, (4, 8, 8), TEXT),
        diffusers.Flux2KleinPipeline: (Flux2DiTBackbone, (16, 4, 4), KLEIN_TEXT),
        diffusers.QwenImagePipeline: (QwenDiTBackbone, (16, 4, 4), {}),
        diffusers.ChromaPipeline: (ChromaDiTBackbone, (16, 4, 4), TEXT),
        diffusers.WanPipeline: (VideoDiTBackbone, (4, 2, 8, 8), TEXT),
        diffusers.LTXPipeline: (LTXBackbone, (4, 2, 8, 8), TEXT),
    }
    videos = {diffusers.WanPipeline: "Wan", diffusers.LTXPipeline: "LTX"}
    if pipeline in sized:
        family, shape, text = sized[pipeline]
        small, encoding = SQUARE | text, family.encoding
        small |= PIPELINES[videos[pipeline]].call if pipeline in videos else {}
        monkeypatch.setattr(family, "default_latent_shape", lambda self: shape)
        monkeypatch.setattr(family, "encoding", lambda self, texts: encoding(self, texts) | text)

    @wraps(call)
    def any_size(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **(small | kwargs))

    monkeypatch.setattr(pipeline, "__call__", any_size)


def plain(name: str, guidance_scale: float = 4.0) -> torch.Tensor:
    """The latents of the pipeline without a guide: 4 is CFG, 1 the conditional model."""
    return _latents(name, guidance_scale, False, DiagonalGaussianDistribution.sample)


def guided(name: str) -> torch.Tensor:
    """The latents of the pipeline with the trained :func:`guide`."""
    return _latents(name, 4.0, True, DiagonalGaussianDistribution.sample)


@cache
def _latents(
    name: str, guidance_scale: float, with_guide: bool, encoding: Callable[..., Any]
) -> torch.Tensor:
    """Drawn once for each way in which images are encoded, which a test may replace."""
    one = build(name)
    with guide(name).attached(one.pipe) if with_guide else nullcontext():
        return one.latents(guidance_scale=guidance_scale)


def twin(one: Pipeline, **parts: Any) -> Pipeline:
    """Another plain pipeline on the same denoiser, with scheduler and tokenizers of its own."""
    scheduler = type(one.pipe.scheduler).from_config(one.pipe.scheduler.config)
    kept = ("requires_safety_checker", "boundary_ratio")
    plain = {k: v for k, v in one.pipe.config.items() if k in kept}
    given = components.own_tokenizers({**one.pipe.components, "scheduler": scheduler} | parts)
    pipe = getattr(diffusers, type(one.pipe).__name__)(**given, **plain)
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe, one.images, one.call)
