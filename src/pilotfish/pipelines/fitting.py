"""Whether a guide fits a pipeline, and its place on it."""

from __future__ import annotations

from inspect import signature
from typing import Any

from diffusers import UNet2DConditionModel

from pilotfish.backbones import Origin, fingerprint, heed_hooks, install, is_compiled, uncompiled
from pilotfish.interface import GuideError, GuideLike

ASKS = "do_classifier_free_guidance"
"""What a pipeline asks itself, and tells those who prepare its conditions."""


def check(guide: GuideLike, pipe: Any) -> Any:
    """The denoiser of a pipeline that can take this guide.

    Raises:
        GuideError: the pipeline does not leave guidance to a guide, or the guide was made for
            another denoiser.
    """
    unet = denoiser_of(pipe)
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")  # few know of no other
    guide.check(fingerprint(unet, prediction), Origin.of(unet))
    return unet


def sit(guide: GuideLike, pipe: Any) -> None:
    """Before a step: the guide beside the denoiser, its hooks on the denoiser as it is now."""
    unet, place = uncompiled(pipe.unet), pipe._execution_device
    if not pipe._pilotfish_hooks.sit_on(unet):
        hooks = install(guide, check(guide, pipe))
        pipe._pilotfish_hooks.remove()
        pipe._pilotfish_hooks = hooks
    if is_compiled(pipe.unet):
        heed_hooks(len(guide.pushes) + len(guide.touches))
    if (guide.device, guide.dtype) != (place, unet.dtype):
        guide.to(place, unet.dtype)


def denoiser_of(pipe: Any) -> Any:
    """The UNet of a pipeline that leaves guidance to a guide.

    Raises:
        GuideError: it does not.
    """
    unet = uncompiled(getattr(pipe, "unet", None))
    if not isinstance(unet, UNet2DConditionModel):
        why = "it has no UNet2DConditionModel"
    elif not hasattr(pipe, "encode_prompt"):
        why = "it has no encode_prompt, which makes the negative prompt"
    elif not hasattr(type(pipe), ASKS):
        why = f"it does not ask {ASKS} whether to make a second pass"
    elif (
        "guidance_scale"
        not in signature(getattr(pipe, "_pilotfish_call", pipe.__call__)).parameters
    ):
        why = "its call takes no guidance_scale"
    elif unet.config.time_cond_proj_dim is not None:
        why = "its denoiser takes in the guidance scale and needs no second pass"
    elif unet.config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        why = f"its denoiser projects the text once more ({unet.config.encoder_hid_dim_type})"
    else:
        return unet
    raise GuideError(f"{type(pipe).__name__} cannot take a guide: {why}; use it without one")
