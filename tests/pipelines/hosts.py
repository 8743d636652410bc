"""Diffusers' pipelines on tiny random components, each with what its call needs beside a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection

from pilotfish import Guide, TinyGuide
from tests import components

SIDE = 16
PROMPTS = ("cat", "a bee")


@dataclass(frozen=True)
class Host:
    """A pipeline and the rest of its call.

    Attributes:
        pipe: the pipeline.
        shown: tensors of its call, one row for each of the PROMPTS.
        call: other arguments.
    """

    pipe: Any
    shown: dict[str, torch.Tensor] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def draw(
        self, prompt: str | Sequence[str] | None = PROMPTS, guidance_scale: float = 4.0, **call: Any
    ) -> torch.Tensor:
        """The final latents, from fixed noise."""
        rows = 1 if isinstance(prompt, str) else len(PROMPTS)
        asked: dict[str, Any] = {
            "prompt": prompt if prompt is None or isinstance(prompt, str) else list(prompt),
            "guidance_scale": guidance_scale,
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(5),
            "output_type": "latent",
        }
        shown = {name: rows_of[:rows] for name, rows_of in self.shown.items()}
        return self.pipe(**(asked | shown | self.call | call)).images

    @contextmanager
    def batches(self) -> Iterator[list[int]]:
        """The batch size of every call of the denoiser."""
        sizes: list[int] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sizes.append(len(args[0] if args else kwargs["sample"]))

        handle = self.pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield sizes
        finally:
            handle.remove()


@dataclass(frozen=True)
class Kind:
    """How a host is built.

    Attributes:
        pipeline: the name of its class in diffusers.
        shown: which pictures its call takes.
        unet: what is particular in the UNet's configuration.
        prediction_type: what its UNet predicts.
        helper: the name and maker of a further component.
        call: further arguments of its call.
    """

    pipeline: str
    shown: tuple[str, ...] = ()
    unet: dict[str, Any] = field(default_factory=dict)
    prediction_type: str = "epsilon"
    helper: tuple[str, Callable[[UNet2DConditionModel], Any]] | None = None
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def xl(self) -> bool:
        """Whether it is of Stable Diffusion XL, with two text encoders."""
        return "XL" in self.pipeline


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """One that has something to say."""
    torch.manual_seed(7)
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made


def adapter(unet: UNet2DConditionModel) -> T2IAdapter:
    torch.manual_seed(8)
    channels = list(unet.config.block_out_channels)
    return T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=2).eval()


CONTROLNET, ADAPTER = ("controlnet", controlnet), ("adapter", adapter)
PICTURE, MASK, CONTROL = ("image",), ("image", "mask_image"), ("image", "control_image")
PARTLY = {"strength": 0.7, "num_inference_steps": 3}

KINDS = {
    "SD": Kind("StableDiffusionPipeline"),
    "SD, v": Kind("StableDiffusionPipeline", prediction_type="v_prediction"),
    "SD img2img": Kind("StableDiffusionImg2ImgPipeline", PICTURE, call=PARTLY),
    "SD inpaint": Kind("StableDiffusionInpaintPipeline", MASK, call=PARTLY),
    "SD inpaint, 9 channels": Kind(
        "StableDiffusionInpaintPipeline", MASK, {"in_channels": 9}, call=PARTLY
    ),
    "SD depth2img": Kind(
        "StableDiffusionDepth2ImgPipeline", ("image", "depth_map"), {"in_channels": 5}, call=PARTLY
    ),
    "SD ControlNet": Kind("StableDiffusionControlNetPipeline", PICTURE, helper=CONTROLNET),
    "SD ControlNet img2img": Kind(
        "StableDiffusionControlNetImg2ImgPipeline", CONTROL, helper=CONTROLNET, call=PARTLY
    ),
    "SD ControlNet inpaint": Kind(
        "StableDiffusionControlNetInpaintPipeline", (*MASK, "control_image"), helper=CONTROLNET,
        call=PARTLY,
    ),
    "SD T2I-Adapter": Kind("StableDiffusionAdapterPipeline", PICTURE, helper=ADAPTER),
    "SDXL": Kind("StableDiffusionXLPipeline"),
    "SDXL img2img": Kind("StableDiffusionXLImg2ImgPipeline", PICTURE, call=PARTLY),
    "SDXL inpaint": Kind("StableDiffusionXLInpaintPipeline", MASK, call=PARTLY),
    "SDXL inpaint, 9 channels": Kind(
        "StableDiffusionXLInpaintPipeline", MASK, {"in_channels": 9}, call=PARTLY
    ),
    "SDXL ControlNet": Kind("StableDiffusionXLControlNetPipeline", PICTURE, helper=CONTROLNET),
    "SDXL ControlNet img2img": Kind(
        "StableDiffusionXLControlNetImg2ImgPipeline", CONTROL, helper=CONTROLNET, call=PARTLY
    ),
    "SDXL ControlNet inpaint": Kind(
        "StableDiffusionXLControlNetInpaintPipeline", (*MASK, "control_image"), helper=CONTROLNET,
        call=PARTLY,
    ),
    "SDXL T2I-Adapter": Kind("StableDiffusionXLAdapterPipeline", PICTURE, helper=ADAPTER),
}  # fmt: skip
"""Pipelines that a guide works on, by the name they have in the docs."""


@cache
def _encoders() -> dict[str, Any]:
    tokenizer = components.tokenizer()
    return {
        "vae": components.autoencoder(),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": components.text_encoder(tokenizer, 2),
        "text_encoder_2": components.text_encoder(tokenizer, 2, CLIPTextModelWithProjection),
    }


@cache
def _unet(name: str) -> UNet2DConditionModel:
    kind = KINDS[name]
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + components.WIDTH,
        "cross_attention_dim": 2 * components.WIDTH,  # of two text encoders side by side
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
    }
    plain = {"addition_embed_type": None}
    return components.unet(**(xl if kind.xl else plain) | kind.unet)


@cache
def _helper(name: str) -> dict[str, Any]:
    kind = KINDS[name]
    return {kind.helper[0]: kind.helper[1](_unet(name))} if kind.helper else {}


def shared(name: str) -> dict[str, Any]:
    """What a pipeline is made of, beside its UNet and scheduler."""
    kind = KINDS[name]
    made: dict[str, Any] = {**_encoders()}
    if not kind.xl:
        made = {k: v for k, v in made.items() if not k.endswith("_2")}
        made |= {"feature_extractor": None}
        if "Depth" in kind.pipeline:
            made |= {"depth_estimator": None}
        else:
            made |= {"safety_checker": None, "requires_safety_checker": False}
    return made | _helper(name)


def guide(name: str, trained: bool = True, kind: type[Guide] = TinyGuide) -> Guide:
    """One for the pipeline's denoiser; trained, every parameter of it has moved."""
    torch.manual_seed(3)
    made = kind.for_denoiser(_unet(name), KINDS[name].prediction_type).eval()
    with torch.no_grad():
        for parameter in made.parameters() if trained else ():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def host(name: str, pipeline: str | None = None, **parts: Any) -> Host:
    """A fresh one, with a denoiser of its own; others of its parts, or its class, may be given."""
    kind = KINDS[name]
    own: dict[str, Any] = {
        "unet": copy.deepcopy(_unet(name)),
        "scheduler": components.scheduler(kind.prediction_type),
    }
    pipe = getattr(diffusers, pipeline or kind.pipeline)(**(shared(name) | own | parts))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    sizes = {"mask_image": (1, SIDE, SIDE), "depth_map": (SIDE, SIDE)}
    shown = {
        what: torch.rand(len(PROMPTS), *sizes.get(what, (3, SIDE, SIDE)), generator=generator)
        for what in kind.shown
    }
    return Host(pipe, shown, kind.call)


def sibling(one: Host) -> Host:
    """Another plain pipeline on the same denoiser, with scheduler and tokenizers of its own."""
    scheduler = type(one.pipe.scheduler).from_config(one.pipe.scheduler.config)
    plain = {k: v for k, v in one.pipe.config.items() if k == "requires_safety_checker"}
    pipe = getattr(diffusers, type(one.pipe).__name__)(
        **components.own_tokenizers({**one.pipe.components, "scheduler": scheduler}), **plain
    )
    pipe.set_progress_bar_config(disable=True)
    return Host(pipe, one.shown, one.call)
