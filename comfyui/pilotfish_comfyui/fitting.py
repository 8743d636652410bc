"""Whether a model of ComfyUI takes a guide, said in words where it does not."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_sampling
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import SD3, SDXL, SDXLRefiner
from comfy.samplers import CFGGuider

from pilotfish.backbones import Origin
from pilotfish.guides import TinyGuide
from pilotfish.guides.base import Guide
from pilotfish.interface import GuideError

from .backbone import ComfyBackbone
from .mmdit import ComfyMMDiTBackbone
from .unet import ComfyUNetBackbone

KEY = "pilotfish"
"""Under which wrappers, the guide's weights and a running sampling are kept."""
logger = logging.getLogger(__name__)


def prediction_type(sampling: Any) -> str:
    """The prediction type of a ``model_sampling``, by diffusers' name.

    Raises:
        GuideError: it is none that diffusers' denoisers have.
    """
    names = {kind.__name__ for kind in type(sampling).__mro__}
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        if "V_PREDICTION" in names and "EDM" not in names:
            return "v_prediction"
        if "EPS" in names and not names & {"X0", "LCM", "EDM", "V_PREDICTION"}:
            return "epsilon"
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow) and "CONST" in names:
        return "flow"
    kinds = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
    raise GuideError(f"a model with the sampling {kinds} takes no guide; epsilon, v and flow do")


def backbone_of(model: Any) -> ComfyBackbone:
    """The backbone of a ``BaseModel``.

    Raises:
        GuideError: its denoiser is neither a UNet of Stable Diffusion 1.x, 2.x or XL nor the
            transformer of Stable Diffusion 3 or 3.5.
    """
    name, net = type(model).__name__, model.diffusion_model
    if isinstance(net, MMDiT) and isinstance(model, SD3):
        return ComfyMMDiTBackbone(net)
    if not isinstance(net, UNetModel):
        raise GuideError(
            f"{name} takes no guide in ComfyUI: {type(net).__name__} is neither a UNet nor the "
            "transformer of Stable Diffusion 3"
        )
    if net.num_classes is not None and not isinstance(model, SDXL | SDXLRefiner):
        raise GuideError(f"{name} has conditions beside the text that no guide knows")
    return ComfyUNetBackbone(net, sizes=5 if isinstance(model, SDXLRefiner) else 6)


def check(guide: Guide, model: Any, sampling: Any) -> ComfyBackbone:
    """The backbone of a model that can take this guide.

    Args:
        model: a ``BaseModel``.
        sampling: its ``model_sampling``.

    Raises:
        GuideError: it cannot; the message names both.
    """
    if not isinstance(guide, TinyGuide):
        raise GuideError(f"ComfyUI takes guides of the type tiny, not {type(guide).__name__}")
    backbone = backbone_of(model)
    config = type(getattr(model, "model_config", None)).__name__
    signature = backbone.signature(prediction_type(sampling))
    guide.check(signature, Origin(f"{type(model).__name__} in ComfyUI (configuration {config})"))
    return backbone


def check_patches(options: dict[str, Any], wrappers: dict[str, Any] | None = None) -> None:
    """Refuse patches of other nodes that a guide does not go with.

    Args:
        options: the ``model_options``.
        wrappers: of the model.

    Raises:
        GuideError: naming the patch and what to do.
    """
    to = options.get("transformer_options", {})
    compiled = any("torch.compile" in (keys or {}) for keys in (wrappers or {}).values())
    replaced = to.get("patches_replace", {})
    attention = "attn2" in replaced or "attn2_patch" in to.get("patches", {})
    refused = {
        "torch.compile": compiled,
        "patches of the cross-attention (IP-Adapter and others)": attention,
        "a patch that replaces blocks of the transformer": bool(replaced.get("dit")),
        "another way to run the two passes (sampler_calc_cond_batch_function)":
            "sampler_calc_cond_batch_function" in options,
        "context windows": options.get("context_handler") is not None,
        "a sampler or patch that needs the unconditional prediction (CFG++ and others)":
            options.get("disable_cfg1_optimization", False),
    }  # fmt: skip
    for what, found in refused.items():
        if found:
            raise GuideError(f"{what} does not go with a guide; remove it or Apply guide")


def warn_of_patches(options: dict[str, Any]) -> None:
    """Warn of functions that see the second pass, in which a guide gives its own prediction."""
    for name in ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function"):
        if options.get(name):
            logger.warning("%s acts on the second pass, and a guide makes none", name)


def check_guider(guider: Any) -> None:
    """Refuse a guider that runs passes of its own.

    Raises:
        GuideError: naming it.
    """
    if type(guider).predict_noise is not CFGGuider.predict_noise:
        raise GuideError(
            f"{type(guider).__name__} runs passes of its own; use KSampler or CFGGuider with a "
            "guide"
        )
