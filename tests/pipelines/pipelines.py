"""Diffusers' pipelines on tiny random components, each with what its call needs beside a prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    SD3ControlNetModel,
    T2IAdapter,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.utils import is_ftfy_available
from PIL import Image
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

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

if not is_ftfy_available():  # which Wan's other pipelines ask
    pipeline_wan_i2v.prompt_clean = str.strip

SIDE = 16
PROMPTS = ("cat", "a bee")
CHANNELS = 16
"""Of SD3's latents; its inpainting pipelines take no other number."""


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

    @contextmanager
    def batches(self) -> Iterator[list[int]]:
        """The batch size of every call of the denoiser."""
        sizes: list[int] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            sizes.append(
                len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states")))
            )

        handles = [d.register_forward_pre_hook(note, with_kwargs=True) for d in self.denoisers]
        try:
            yield sizes
        finally:
            for handle in handles:
                handle.remove()

    def hooks(self) -> int:
        """Hooks on the denoisers."""
        modules = [m for denoiser in self.denoisers for m in denoiser.modules()]
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


MASKED = ("PixArt", "Sana", "Lumina2", "AuraFlow", "LTX", "Chroma")
"""Families whose text and its mask are encoded together with the negative prompt's."""
OTHERS = (*MASKED, "Flux2Klein", "Wan", "CogView4", "Qwen", "ZImage")
"""All transformers but Stable Diffusion 3."""


@dataclass(frozen=True)
class Spec:
    """How a pipeline is built.

    Attributes:
        pipeline: the name of its class in diffusers.
        images: which images its call takes.
        denoiser: what is particular in the denoiser's configuration.
        prediction_type: what the denoiser predicts.
        helper: the name and maker of a further component.
        call: further arguments of its call.
        boundary_ratio: of the timesteps, where a second denoiser takes over.
    """

    pipeline: str
    images: tuple[str, ...] = ()
    denoiser: dict[str, Any] = field(default_factory=dict)
    prediction_type: str = "epsilon"
    helper: tuple[str, Callable[[Any], Any]] | None = None
    call: dict[str, Any] = field(default_factory=dict)
    boundary_ratio: float | None = None

    @property
    def family(self) -> str:
        """SD, SDXL, SD3, or one of OTHERS."""
        if "Diffusion3" in self.pipeline:
            return "SD3"
        for name in OTHERS:
            if name in self.pipeline:
                return name
        return "SDXL" if "XL" in self.pipeline else "SD"


def controlnet(denoiser: Any) -> Any:
    """One whose every layer adds something."""
    torch.manual_seed(7)
    if isinstance(denoiser, diffusers.UNet2DConditionModel):
        made: Any = ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(4, 8))
    elif isinstance(denoiser, diffusers.QwenImageTransformer2DModel):
        config = denoiser.config
        made = QwenImageControlNetModel.from_transformer(
            denoiser, 2, config.attention_head_dim, config.num_attention_heads
        )
    else:
        made = SD3ControlNetModel.from_transformer(
            denoiser, num_layers=2, num_extra_conditioning_channels=0
        )
    return components.randomise(made, by=0.05)


def control_with_mask(transformer: Any) -> Any:
    """The same with one more channel for the mask."""
    torch.manual_seed(7)
    made = SD3ControlNetModel.from_transformer(
        transformer, num_layers=2, num_extra_conditioning_channels=1,
        load_weights_from_transformer=False,
    )  # fmt: skip
    return components.randomise(made, by=0.05)


def adapter(unet: Any) -> T2IAdapter:
    torch.manual_seed(8)
    channels = list(unet.config.block_out_channels)
    return T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=2).eval()


CONTROLNET, ADAPTER = ("controlnet", controlnet), ("adapter", adapter)
IMAGE, MASK, CONTROL = ("image",), ("image", "mask_image"), ("image", "control_image")
PARTLY = {"strength": 0.7, "num_inference_steps": 3}
SD3_CALL: dict[str, Any] = {"max_sequence_length": 4}
PIXART_CALL: dict[str, Any] = {
    "use_resolution_binning": False, "clean_caption": False,
    "max_sequence_length": components.TOKENS,
}  # fmt: skip

KLEIN_TEXT: dict[str, Any] = {
    "max_sequence_length": components.TOKENS, "text_encoder_out_layers": (0, 1, 1),
}  # fmt: skip


CHROMA_CALL: dict[str, Any] = {
    "height": SIDE, "width": SIDE, "max_sequence_length": components.TOKENS,
}  # fmt: skip


def _chroma(pipeline: str, images: tuple[str, ...] = (), **call: Any) -> Spec:
    return Spec(pipeline, images, {"in_channels": 16}, "flow", call=CHROMA_CALL | call)


def _sd3(pipeline: str, images: tuple[str, ...] = (), helper: Any = None, **call: Any) -> Spec:
    return Spec(pipeline, images, {}, "flow", helper, SD3_CALL | call)


def _qwen(pipeline: str, images: tuple[str, ...] = (), helper: Any = None) -> Spec:
    channels, size = {"in_channels": 16, "out_channels": 4}, {"height": SIDE, "width": SIDE}
    return Spec(pipeline, images, channels, "flow", helper, size)


def _wan(
    pipeline: str, denoiser: dict[str, Any] | None = None, two: bool = False, **call: Any
) -> Spec:
    size = {"height": SIDE, "width": SIDE, "num_frames": 5}
    call = size | {"max_sequence_length": components.TOKENS} | call
    images = ("image",) if "Image" in pipeline else ()
    if not two:
        return Spec(pipeline, images, denoiser or {}, "flow", None, call)
    call["guidance_scale_2"] = 3.0
    return Spec(pipeline, images, denoiser or {}, "flow", None, call, 0.7)


PIPELINES = {
    "SD": Spec("StableDiffusionPipeline"),
    "SD, v": Spec("StableDiffusionPipeline", prediction_type="v_prediction"),
    "SD img2img": Spec("StableDiffusionImg2ImgPipeline", IMAGE, call=PARTLY),
    "SD inpaint": Spec("StableDiffusionInpaintPipeline", MASK, call=PARTLY),
    "SD inpaint, 9 channels": Spec(
        "StableDiffusionInpaintPipeline", MASK, {"in_channels": 9}, call=PARTLY
    ),
    "SD depth2img": Spec(
        "StableDiffusionDepth2ImgPipeline", ("image", "depth_map"), {"in_channels": 5}, call=PARTLY
    ),
    "SD ControlNet": Spec("StableDiffusionControlNetPipeline", IMAGE, helper=CONTROLNET),
    "SD ControlNet img2img": Spec(
        "StableDiffusionControlNetImg2ImgPipeline", CONTROL, helper=CONTROLNET, call=PARTLY
    ),
    "SD ControlNet inpaint": Spec(
        "StableDiffusionControlNetInpaintPipeline", (*MASK, "control_image"), helper=CONTROLNET,
        call=PARTLY,
    ),
    "SD T2I-Adapter": Spec("StableDiffusionAdapterPipeline", IMAGE, helper=ADAPTER),
    "SDXL": Spec("StableDiffusionXLPipeline"),
    "SDXL img2img": Spec("StableDiffusionXLImg2ImgPipeline", IMAGE, call=PARTLY),
    "SDXL inpaint": Spec("StableDiffusionXLInpaintPipeline", MASK, call=PARTLY),
    "SDXL inpaint, 9 channels": Spec(
        "StableDiffusionXLInpaintPipeline", MASK, {"in_channels": 9}, call=PARTLY
    ),
    "SDXL ControlNet": Spec("StableDiffusionXLControlNetPipeline", IMAGE, helper=CONTROLNET),
    "SDXL ControlNet img2img": Spec(
        "StableDiffusionXLControlNetImg2ImgPipeline", CONTROL, helper=CONTROLNET, call=PARTLY
    ),
    "SDXL ControlNet inpaint": Spec(
        "StableDiffusionXLControlNetInpaintPipeline", (*MASK, "control_image"), helper=CONTROLNET,
        call=PARTLY,
    ),
    "SDXL T2I-Adapter": Spec("StableDiffusionXLAdapterPipeline", IMAGE, helper=ADAPTER),
    "SD3": _sd3("StableDiffusion3Pipeline"),
    "SD3 img2img": _sd3("StableDiffusion3Img2ImgPipeline", IMAGE, **PARTLY),
    "SD3 inpaint": _sd3("StableDiffusion3InpaintPipeline", MASK, **PARTLY),
    "SD3 inpaint, 33 channels": Spec(
        "StableDiffusion3InpaintPipeline", MASK, {"in_channels": 33, "out_channels": CHANNELS},
        "flow", call=SD3_CALL | PARTLY,
    ),
    "SD3 ControlNet": _sd3("StableDiffusion3ControlNetPipeline", ("control_image",), CONTROLNET),
    "SD3 ControlNet inpaint": _sd3(
        "StableDiffusion3ControlNetInpaintingPipeline", ("control_image", "control_mask"),
        ("controlnet", control_with_mask),
    ),
    "PixArt-Sigma": Spec("PixArtSigmaPipeline", call=PIXART_CALL),
    "PixArt-Alpha": Spec("PixArtAlphaPipeline", call=PIXART_CALL),
    "Lumina2": Spec(
        "Lumina2Pipeline", prediction_type="flow",
        call={"system_prompt": "", "max_sequence_length": 24},
    ),
    "AuraFlow": Spec(
        "AuraFlowPipeline", prediction_type="flow",
        call={"height": SIDE, "width": SIDE, "max_sequence_length": components.TOKENS},
    ),
    "FLUX.2 klein": Spec(
        "Flux2KleinPipeline", (), {"in_channels": 16}, "flow",
        call={"height": SIDE, "width": SIDE, **KLEIN_TEXT},
    ),
    "LTX": Spec(
        "LTXPipeline", prediction_type="flow",
        call={
            "height": 2 * SIDE, "width": 2 * SIDE, "num_frames": 5,
            "max_sequence_length": components.TOKENS,
        },
    ),
    "Wan": _wan("WanPipeline"),
    "Wan 2.2": _wan("WanPipeline", two=True),
    "Wan 2.2 image-to-video": _wan("WanImageToVideoPipeline", {"in_channels": 10}, two=True),
    "Wan 2.1 image-to-video": _wan(
        "WanImageToVideoPipeline",
        {"in_channels": 10, "image_dim": components.WIDTH, "added_kv_proj_dim": 24},
        max_sequence_length=512,
    ),
    "Chroma": _chroma("ChromaPipeline"),
    "Chroma img2img": _chroma("ChromaImg2ImgPipeline", IMAGE, **PARTLY),
    "CogView4": Spec("CogView4Pipeline", prediction_type="flow"),
    "CogView4 Control": Spec(
        "CogView4ControlPipeline", ("control_image",), {"in_channels": 8}, "flow"
    ),
    "Qwen-Image": _qwen("QwenImagePipeline"),
    "Qwen-Image edit": _qwen("QwenImageEditPipeline", ("image",)),
    "Qwen-Image ControlNet": _qwen(
        "QwenImageControlNetPipeline", ("control_image",), CONTROLNET
    ),
    "Z-Image": Spec(
        "ZImagePipeline", prediction_type="flow",
        call={"height": SIDE, "width": SIDE, "max_sequence_length": 24},
    ),
    "Sana": Spec(
        "SanaPipeline", denoiser={"timestep_scale": 0.01}, prediction_type="flow",
        call=PIXART_CALL | {
            "height": 2 * SIDE, "width": 2 * SIDE, "complex_human_instruction": ["a"],
        },
    ),
}  # fmt: skip
"""Pipelines that a guide works on, by the name they have in the docs."""


@cache
def _tokenizer() -> Any:
    return components.tokenizer()


@cache
def _part(name: str) -> Any:
    """A component that pipelines share."""
    tokenizer = _tokenizer()
    if name == "text_encoder":
        return components.text_encoder(tokenizer, 2)
    if name == "text_encoder_2":
        return components.text_encoder(tokenizer, 2, CLIPTextModelWithProjection)
    if name == "vae":
        return components.autoencoder()
    if name == "vae of Chroma":
        return components.autoencoder(shift_factor=0.1)
    if name == "vae of Sana":
        return components.deep_autoencoder()
    if name == "vae of Qwen":
        return components.packed_autoencoder()
    if name == "vae of Flux2Klein":
        return components.flux2_autoencoder()
    if name == "vae of LTX":
        return components.ltx_autoencoder()
    if name == "vae of Wan, from images":
        return components.video_autoencoder(temperal_downsample=[True], scale_factor_temporal=2)
    if name == "vae of Wan":
        return components.video_autoencoder()
    if name == "vae of SD3":
        config = {k: v for k, v in components.autoencoder().config.items() if k[0] != "_"}
        torch.manual_seed(2)
        config |= {"latent_channels": CHANNELS, "shift_factor": 0.1}
        return AutoencoderKL(**config).eval()
    width = components.WIDTH
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    if name == "t5 with images":
        return editing.text_encoder(config)
    assert name == "t5"
    torch.manual_seed(3)
    return T5EncoderModel(config).eval()


def shared(name: str, alone: bool = False) -> dict[str, Any]:
    """What a pipeline is made of, beside its denoiser and scheduler; made anew, if it is to stand
    alone."""
    spec = PIPELINES[name]
    part = _part.__wrapped__ if alone else _part
    made: dict[str, Any] = {"vae": part("vae"), "tokenizer": _tokenizer()}
    if spec.family in ("ZImage", "Flux2Klein"):
        made["tokenizer"] = copy.deepcopy(_tokenizer())
        made["tokenizer"].chat_template = "{{ messages[0]['content'] }}"
    if spec.family in OTHERS:
        own = f"vae of {spec.family}"
        with_own = ("Chroma", "Sana", "Flux2Klein", "LTX", "Wan", "Qwen")
        vae = {"vae": part(own)} if spec.family in with_own else {}
        made |= {"text_encoder": part("t5")} | vae
        if "Edit" in spec.pipeline:
            processor = editing.Processor(made["tokenizer"])
            made |= {"text_encoder": part("t5 with images"), "processor": processor}
        if "ImageToVideo" in spec.pipeline:
            encoder, processor = components.image_encoder(SIDE)
            made |= {"vae": part("vae of Wan, from images"), "image_encoder": encoder,
                     "image_processor": processor}  # fmt: skip
        return made | (copy.deepcopy(_helper(name)) if alone else _helper(name))
    made["text_encoder"] = part("text_encoder_2" if spec.family == "SD3" else "text_encoder")
    if spec.family != "SD":
        made |= {"tokenizer_2": _tokenizer(), "text_encoder_2": part("text_encoder_2")}
    if spec.family == "SD3":
        made |= {"vae": part("vae of SD3"), "text_encoder_3": None, "tokenizer_3": None}
    elif spec.family == "SD":
        made |= {"feature_extractor": None}
        if "Depth" in spec.pipeline:
            made |= {"depth_estimator": None}
        else:
            made |= {"safety_checker": None, "requires_safety_checker": False}
    return made | (copy.deepcopy(_helper(name)) if alone else _helper(name))


@cache
def _denoiser(name: str, seed: int = 0) -> Any:
    spec = PIPELINES[name]
    if spec.family == "SD3":
        return components.sd3_transformer(
            **({"in_channels": CHANNELS, "out_channels": CHANNELS} | spec.denoiser)
        )
    if spec.family in OTHERS:
        known = {"ZImage": "z_image", "AuraFlow": "aura_flow", "Flux2Klein": "flux2"}
        kind = known.get(spec.family, spec.family.lower())
        make: Any = getattr(components, f"{kind}_transformer")
        return make(seed, **spec.denoiser)
    xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + components.WIDTH,
        "cross_attention_dim": 2 * components.WIDTH,  # of two text encoders side by side
        "use_linear_projection": True,
        "transformer_layers_per_block": [1, 2],
    }
    plain = {"addition_embed_type": None}
    return components.unet(**(xl if spec.family == "SDXL" else plain) | spec.denoiser)


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
    torch.manual_seed(seed)
    if kind is TinyGuide and not settings:
        settings = {"condition_on_negative": True, "uncond_templates": 2}
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
    component = "transformer" if spec.family in ("SD3", *OTHERS) else "unet"
    others = components.own_tokenizers(shared(name, alone)) if alone else shared(name)
    own: dict[str, Any] = {"scheduler": scheduler(name)}
    if component not in parts:
        own[component] = components.clone(_denoiser(name))
    if spec.boundary_ratio is not None:
        own |= {"transformer_2": components.clone(_denoiser(name, 1)),
                "boundary_ratio": spec.boundary_ratio}  # fmt: skip
    pipe = getattr(diffusers, pipeline or spec.pipeline)(**(others | own | parts))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(9)
    sizes = {"mask_image": (1, SIDE, SIDE), "control_mask": (1, SIDE, SIDE),
             "depth_map": (SIDE, SIDE)}  # fmt: skip
    images: dict[str, Any] = {
        what: torch.rand(len(PROMPTS), *sizes.get(what, (3, SIDE, SIDE)), generator=generator)
        for what in spec.images
    }
    if "Edit" in spec.pipeline or "ImageToVideo" in spec.pipeline:
        images = {what: VaeImageProcessor.pt_to_numpy(image) for what, image in images.items()}
        images = {what: VaeImageProcessor.numpy_to_pil(image) for what, image in images.items()}
    if "ImageToVideo" in spec.pipeline:
        images = {what: image[0] for what, image in images.items()}
    return Pipeline(pipe, images, spec.call)


def without_bins(pipeline: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of a pipeline class without what is that of full-size models: bins of sizes, and
    default sizes."""
    call: Any = pipeline.__call__
    small: dict[str, Any] = {}
    if "use_resolution_binning" in signature(call).parameters:
        small = {"use_resolution_binning": False}
    if pipeline is diffusers.SanaPipeline:
        small |= {"height": 2 * SIDE, "width": 2 * SIDE}
    text = {"max_sequence_length": components.TOKENS}
    sized: dict[type, tuple[type[Backbone], tuple[int, ...], dict[str, Any]]] = {
        diffusers.ZImagePipeline: (ZImageDiTBackbone, (4, 8, 8), {}),
        diffusers.AuraFlowPipeline: (AuraFlowDiTBackbone, (4, 8, 8), text),
        diffusers.Flux2KleinPipeline: (Flux2DiTBackbone, (16, 4, 4), KLEIN_TEXT),
        diffusers.QwenImagePipeline: (QwenDiTBackbone, (16, 4, 4), {}),
        diffusers.ChromaPipeline: (ChromaDiTBackbone, (16, 4, 4), text),
        diffusers.WanPipeline: (VideoDiTBackbone, (4, 2, 8, 8), text),
        diffusers.LTXPipeline: (LTXBackbone, (4, 2, 8, 8), text),
    }
    videos = {diffusers.WanPipeline: "Wan", diffusers.LTXPipeline: "LTX"}
    if pipeline in sized:
        family, shape, text = sized[pipeline]
        small, encoding = {"height": SIDE, "width": SIDE, **text}, family.encoding
        small |= PIPELINES[videos[pipeline]].call if pipeline in videos else {}
        monkeypatch.setattr(family, "latent_shape", lambda self: shape)
        monkeypatch.setattr(family, "encoding", lambda self, texts: encoding(self, texts) | text)

    @wraps(call)
    def any_size(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **(small | kwargs))

    monkeypatch.setattr(pipeline, "__call__", any_size)


@cache
def plain(name: str, guidance_scale: float = 4.0) -> torch.Tensor:
    """The latents of the pipeline without a guide: 4 is CFG, 1 the conditional model."""
    return build(name).latents(guidance_scale=guidance_scale)


@cache
def guided(name: str) -> torch.Tensor:
    """The latents of the pipeline with the trained :func:`guide`."""
    one = build(name)
    with guide(name).attached(one.pipe):
        return one.latents()


def twin(one: Pipeline, **parts: Any) -> Pipeline:
    """Another plain pipeline on the same denoiser, with scheduler and tokenizers of its own."""
    scheduler = type(one.pipe.scheduler).from_config(one.pipe.scheduler.config)
    kept = ("requires_safety_checker", "boundary_ratio")
    plain = {k: v for k, v in one.pipe.config.items() if k in kept}
    given = components.own_tokenizers({**one.pipe.components, "scheduler": scheduler} | parts)
    pipe = getattr(diffusers, type(one.pipe).__name__)(**given, **plain)
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe, one.images, one.call)
