"""Guides with a fixed answer, an attention in which text reads itself, one guided call."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import nn

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.extrapolation import split_heads
from pilotfish.guidances import CFG
from pilotfish.interface import GuideInputs, GuideOutput, TextConditions
from tests import components

TIME = torch.tensor([0.9, 0.1])


class FixedGuide:
    """A guide that answers the same to every call and keeps what it was given."""

    guidance_scale_range = (1.0, 8.0)
    dtype = torch.float32
    guidance = CFG

    def __init__(
        self, output: GuideOutput | None = None, joint_attention: str = "whole",
        negative_stream: str = "joint", image_tokens: int = 16,
    ) -> None:  # fmt: skip
        self.joint_attention, self.negative_stream = joint_attention, negative_stream
        self.image_tokens = image_tokens
        self.output = output or GuideOutput()
        self.inputs: list[GuideInputs] = []

    @property
    def target_modules(self) -> tuple[str, ...]:
        return tuple(self.output.residuals)

    @property
    def extrapolated(self) -> tuple[str, ...]:
        return tuple(self.output.gains)

    def parameters(self) -> tuple[torch.Tensor, ...]:
        return ()

    def modulations(self, *_: Any) -> None:
        return None

    def __call__(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        self.inputs.append(inputs)
        return self.output


class TextReadsItself(JointAttnProcessor2_0):
    """Attention in which the image's tokens attend to all, the text's to each other alone."""

    def __call__(  # type: ignore[override]
        self, attn: Any, hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        made = super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)
        if encoder_hidden_states is None:
            return made
        q, k, v = (
            split_heads(projection(encoder_hidden_states), attn.heads)
            for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            q, k = attn.norm_added_q(q), attn.norm_added_k(k)
        own = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return made[0], made[1] if attn.context_pre_only else attn.to_add_out(own)


def equal_gains(denoiser: nn.Module, gain: float, n: int = 2) -> dict[str, torch.Tensor]:
    """One gain for every layer that can be extrapolated."""
    sites = Backbone.of(denoiser).sites()
    widths = {**dict(sites["attention"]), **dict.fromkeys(sites["modulation"], 1)}
    return {name: torch.full((n, width), gain) for name, width in widths.items()}


@torch.no_grad()
def guided(
    denoiser: nn.Module, guide: Any, latents: torch.Tensor, text: TextConditions,
    negative: TextConditions, *, time: torch.Tensor = TIME, scale: Any = 4.0, sizes: Any = None,
) -> torch.Tensor:  # fmt: skip
    """One guided call; no hook stays."""
    backbone = Backbone.of(denoiser)
    hooks = backbone.install(guide)
    try:
        with GuidedPass(guide, lambda: scale, lambda: negative, hooks=hooks).open():
            return backbone(latents, time, text, sizes)
    finally:
        hooks.remove()


@torch.no_grad()
def plain(
    denoiser: nn.Module, latents: torch.Tensor, text: TextConditions, *,
    time: torch.Tensor = TIME, sizes: Any = None,
) -> torch.Tensor:  # fmt: skip
    """One call without a guide."""
    return Backbone.of(denoiser)(latents, time, text, sizes)


def count_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def assert_negative_is_recovered(
    denoiser: Any, text: TextConditions, negative: TextConditions, sizes: Any = None
) -> None:
    """A gain of -1 in every layer gives the prediction for the negative prompt."""
    video = isinstance(denoiser, WanTransformer3DModel | LTXVideoTransformer3DModel)
    kind = "wan" if video else "unet"
    latents = components.FAMILIES[kind].latents(2)
    unconditional = plain(denoiser, latents, negative[torch.tensor([0, 0])], sizes=sizes)
    conditional = plain(denoiser, latents, text, sizes=sizes)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)))
    made = guided(denoiser, guide, latents, text, negative, sizes=sizes)
    torch.testing.assert_close(made, unconditional, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(made, conditional, atol=1e-4)
