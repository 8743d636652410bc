"""Which pipelines of diffusers are tested, and how each is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    QwenImageControlNetModel,
    SD3ControlNetModel,
    T2IAdapter,
)

from tests import components

SIDE = 16
SQUARE: dict[str, Any] = {"height": SIDE, "width": SIDE}
TEXT: dict[str, Any] = {"max_sequence_length": components.TOKENS}
KLEIN_TEXT = TEXT | {"text_encoder_out_layers": (0, 1, 1)}
CHANNELS = 16
"""Of SD3's latents; its inpainting pipelines take no other number."""

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
        usual = "SDXL" if "XL" in self.pipeline else "SD"
        return next((name for name in OTHERS if name in self.pipeline), usual)

    @property
    def component(self) -> str:
        """Name of the denoiser among the pipeline's components."""
        return "unet" if self.family in ("SD", "SDXL") else "transformer"


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


CONTROLNET = ("controlnet", controlnet)
IMAGE, MASK, CONTROL = ("image",), ("image", "mask_image"), ("image", "control_image")
PARTLY = {"strength": 0.7, "num_inference_steps": 3}
PIXART_CALL = TEXT | {"use_resolution_binning": False, "clean_caption": False}


def _unet(xl: str = "") -> dict[str, Spec]:
    """Stable Diffusion's, or with ``xl="XL"`` those of SDXL."""

    def spec(kind: str = "", images: tuple[str, ...] = (), **rest: Any) -> Spec:
        return Spec(f"StableDiffusion{xl}{kind}Pipeline", images, **rest)

    net = {"helper": CONTROLNET}
    made = {
        "": spec(),
        ", v": spec(prediction_type="v_prediction"),
        " img2img": spec("Img2Img", IMAGE, call=PARTLY),
        " inpaint": spec("Inpaint", MASK, call=PARTLY),
        " inpaint, 9 channels": spec("Inpaint", MASK, denoiser={"in_channels": 9}, call=PARTLY),
        " depth2img": spec(
            "Depth2Img", ("image", "depth_map"), denoiser={"in_channels": 5}, call=PARTLY
        ),
        " ControlNet": spec("ControlNet", IMAGE, **net),
        " ControlNet img2img": spec("ControlNetImg2Img", CONTROL, **net, call=PARTLY),
        " ControlNet inpaint": spec(
            "ControlNetInpaint", (*MASK, "control_image"), **net, call=PARTLY
        ),
        " T2I-Adapter": spec("Adapter", IMAGE, helper=("adapter", adapter)),
    }
    absent = (", v", " depth2img") if xl else ()
    return {f"SD{xl}{name}": one for name, one in made.items() if name not in absent}


def _flow(
    pipeline: str, images: tuple[str, ...] = (), helper: Any = None,
    denoiser: dict[str, Any] | None = None, **call: Any,
) -> Spec:  # fmt: skip
    return Spec(pipeline, images, denoiser or {}, "flow", helper, call)


def _sd3(
    kind: str = "", images: tuple[str, ...] = (), helper: Any = None,
    in_channels: int = CHANNELS, **call: Any,
) -> Spec:  # fmt: skip
    channels = {"in_channels": in_channels, "out_channels": CHANNELS}
    pipeline = f"StableDiffusion3{kind}Pipeline"
    return _flow(pipeline, images, helper, channels, max_sequence_length=4, **call)


def _chroma(pipeline: str, images: tuple[str, ...] = (), **call: Any) -> Spec:
    return _flow(pipeline, images, None, {"in_channels": 16}, **SQUARE, **TEXT, **call)


def _qwen(pipeline: str, images: tuple[str, ...] = (), helper: Any = None) -> Spec:
    return _flow(pipeline, images, helper, {"in_channels": 16, "out_channels": 4}, **SQUARE)


def _wan(
    pipeline: str, denoiser: dict[str, Any] | None = None, two: bool = False, **call: Any
) -> Spec:
    images = ("image",) if "Image" in pipeline else ()
    call = SQUARE | {"num_frames": 5} | TEXT | call
    if not two:
        return _flow(pipeline, images, None, denoiser, **call)
    one = _flow(pipeline, images, None, denoiser, **call, guidance_scale_2=3.0)
    return replace(one, boundary_ratio=0.7)


PIPELINES = {
    **_unet(),
    **_unet("XL"),
    "SD3": _sd3(),
    "SD3 img2img": _sd3("Img2Img", IMAGE, **PARTLY),
    "SD3 inpaint": _sd3("Inpaint", MASK, **PARTLY),
    "SD3 inpaint, 33 channels": _sd3("Inpaint", MASK, in_channels=33, **PARTLY),
    "SD3 ControlNet": _sd3("ControlNet", ("control_image",), CONTROLNET),
    "SD3 ControlNet inpaint": _sd3(
        "ControlNetInpainting", ("control_image", "control_mask"),
        ("controlnet", control_with_mask),
    ),
    "PixArt-Sigma": Spec("PixArtSigmaPipeline", call=PIXART_CALL),
    "PixArt-Alpha": Spec("PixArtAlphaPipeline", call=PIXART_CALL),
    "Lumina2": _flow("Lumina2Pipeline", system_prompt="", max_sequence_length=24),
    "AuraFlow": _flow("AuraFlowPipeline", **SQUARE, **TEXT),
    "FLUX.2 klein": _flow(
        "Flux2KleinPipeline", denoiser={"in_channels": 16}, **SQUARE, **KLEIN_TEXT
    ),
    "LTX": _flow("LTXPipeline", height=2 * SIDE, width=2 * SIDE, num_frames=5, **TEXT),
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
    "CogView4": _flow("CogView4Pipeline"),
    "CogView4 Control": _flow(
        "CogView4ControlPipeline", ("control_image",), denoiser={"in_channels": 8}
    ),
    "Qwen-Image": _qwen("QwenImagePipeline"),
    "Qwen-Image edit": _qwen("QwenImageEditPipeline", ("image",)),
    "Qwen-Image ControlNet": _qwen("QwenImageControlNetPipeline", ("control_image",), CONTROLNET),
    "Z-Image": _flow("ZImagePipeline", **SQUARE, max_sequence_length=24),
    "Sana": _flow(
        "SanaPipeline", denoiser={"timestep_scale": 0.01}, **PIXART_CALL, height=2 * SIDE,
        width=2 * SIDE, complex_human_instruction=["a"],
    ),
}  # fmt: skip
"""Pipelines that a guide works on, by the name they have in the docs."""
