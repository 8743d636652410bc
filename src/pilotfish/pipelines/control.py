"""ControlNets in steps with both passes.

A ControlNet runs before the denoiser on the pipeline's batch. With classifier-free guidance that
batch is doubled and the ControlNet reads both prompts. In a step that runs both passes its batch is
doubled here in the same way, and the denoiser finds its residuals doubled already. A pipeline that
runs its ControlNet on the prompt alone, for both passes, keeps to that: the denoiser's own batch is
doubled with the residuals.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import nn

from pilotfish.backbones import Backbone, GuidedPass, twice_arguments
from pilotfish.interface import GuideError, TextConditions

POOLED = ("pooled_projections", "text_embeds")


@contextmanager
def doubled_controlnets(pipe: Any, backbone: Backbone, guided: GuidedPass) -> Iterator[None]:
    """Inside the block the pipeline's ControlNets run on both passes' batch in the steps in which
    the denoiser will.

    Args:
        guided: that of the running call.
    """
    found = None if backbone.control_from_prompt else getattr(pipe, "controlnet", None)
    nets: list[nn.Module] = [] if found is None else list(getattr(found, "nets", [found]))
    names = {id(net): tuple(signature(net.forward).parameters) for net in nets}

    def before(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if GuidedPass.current() is not guided:
            return None
        given = dict(zip(names[id(net)], args, strict=False)) | kwargs
        if not guided.will_double(given["timestep"], backbone):
            return None
        if guided.guidance.degrades:
            raise GuideError(
                f"{guided.guidance.title} is not implemented with a ControlNet; use the "
                "guide with refresh=0"
            )
        n = len(given["sample"] if "sample" in given else given["hidden_states"])
        both = twice_arguments(given, n)
        added = given.get("added_cond_kwargs") or {}
        seen = given | added
        if seen.get("encoder_hidden_states") is not None:
            pooled = next((seen[k] for k in POOLED if seen.get(k) is not None), None)
            mask = seen.get("encoder_attention_mask")
            text = TextConditions(seen["encoder_hidden_states"], pooled, mask)
            negative = guided.negative_prompts().expand(n).to(text.dtype)
            changed = backbone.text_arguments(TextConditions.cat([negative, text]), both)
            both |= {k: v for k, v in changed.items() if _holds_prompts(given.get(k))}
        return (), both

    with ExitStack() as stack:
        for net in nets:
            handle = net.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _holds_prompts(given: Any) -> bool:
    """Some ControlNets are given zeros in place of the pooled text, in both passes."""
    if isinstance(given, torch.Tensor):
        return bool(given.any())
    return given is not None
