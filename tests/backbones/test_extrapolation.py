"""Layers that take in the text, pushed away from what they answer to the negative prompt."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D

from pilotfish.backbones import (
    GuidedPass,
    cross_attention_layers,
    embedding_layers,
    fingerprint,
    install,
)
from pilotfish.interface import GuideInputs, GuideOutput, TextConditions
from pilotfish.teacher import Conditioned, checkpoint_in_pass

POOLED = 12
POOLED_TEXT = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}  # fmt: skip
"""As SDXL has it."""
SHAPES: list[dict[str, Any]] = [
    {},
    {"layers_per_block": 2, "transformer_layers_per_block": 2},
    {"layers_per_block": (1, 2), "attention_head_dim": (2, 4), "use_linear_projection": True},
]


class Pusher:
    """A guide that pushes every layer that takes in the text as far as it was told."""

    guidance_scale_range = (1.0, 8.0)
    touches = ()

    def __init__(self, unet: UNet2DConditionModel, gain: float) -> None:
        self.config = SimpleNamespace(denoiser=fingerprint(unet, "epsilon"))
        self.dtype = torch.float32
        widths = cross_attention_layers(unet.config) | dict.fromkeys(
            embedding_layers(unet.config), 1
        )
        self.gains = {name: torch.full((2, n), gain) for name, n in widths.items()}

    @property
    def pushes(self) -> tuple[str, ...]:
        return tuple(self.gains)

    def __call__(self, inputs: GuideInputs) -> GuideOutput:
        return GuideOutput(pushes=self.gains)


def prompts(unet: UNet2DConditionModel, n: int, seed: int) -> TextConditions:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n, 8, unet.config.cross_attention_dim, generator=generator)
    if unet.config.addition_embed_type != "text_time":
        return TextConditions(states)
    return TextConditions(states, torch.randn(n, POOLED, generator=generator))


def prompt(unet: UNet2DConditionModel) -> TextConditions:
    return prompts(unet, 2, 6)


def negative_prompt(unet: UNet2DConditionModel) -> TextConditions:
    return prompts(unet, 1, 3)


def call(unet: UNet2DConditionModel, given: TextConditions) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    size, sizes = unet.config.sample_size, torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    z = torch.randn(2, unet.config.in_channels, size, size, generator=generator)
    denoiser = Conditioned(unet, sizes)
    return denoiser(z, torch.tensor([900, 100]), given)


def run(unet: UNet2DConditionModel, gain: float) -> torch.Tensor:
    guide = Pusher(unet, gain)
    hooks = install(guide, unet)
    negative = negative_prompt(unet)
    with torch.no_grad(), GuidedPass(guide, lambda: 4.0, lambda: negative).open():
        pushed = call(unet, prompt(unet))
    hooks.remove()
    return pushed


def without_attention_in_the_encoder(
    make_unet: Callable[..., Any], **config: Any
) -> UNet2DConditionModel:
    """There no attention is pushed."""
    down = ("DownBlock2D",) * len(config.get("block_out_channels", (8, 16)))
    unet: UNet2DConditionModel = make_unet(down_block_types=down, **config)
    return unet


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize(
    "embedded",
    [{}, {"addition_embed_type": None}, {"resnet_time_scale_shift": "scale_shift"}, POOLED_TEXT],
)
def test_pushed_all_the_way_back_they_answer_the_negative_prompt(
    make_unet: Callable[..., Any], config: dict[str, Any], embedded: dict[str, Any]
) -> None:
    unet = without_attention_in_the_encoder(make_unet, **config, **embedded)
    with torch.no_grad():
        expected = call(unet, negative_prompt(unet)[torch.tensor([0, 0])])
        plain = call(unet, prompt(unet))
    pushed = run(unet, -1.0)
    torch.testing.assert_close(pushed, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(pushed, plain, atol=1e-4)


@pytest.mark.parametrize("config", SHAPES)
def test_what_is_not_pushed_is_untouched_bit_for_bit(
    make_unet: Callable[..., Any], config: dict[str, Any]
) -> None:
    unet = make_unet(**config)
    with torch.no_grad():
        plain = call(unet, prompt(unet))
    assert torch.equal(run(unet, 0.0), plain)
    assert not torch.allclose(run(unet, 0.5), plain)


@pytest.mark.parametrize(
    "config", [*SHAPES, {"mid_block_type": "UNetMidBlock2D"}, {"mid_block_type": None}]
)
def test_the_embedding_enters_every_residual_layer(
    make_unet: Callable[..., Any], config: dict[str, Any]
) -> None:
    unet = make_unet(**config)
    there = [name for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)]
    assert sorted(embedding_layers(unet.config)) == sorted(there)


def test_where_no_text_is_embedded_no_residual_layer_takes_it_in(
    make_unet: Callable[..., Any],
) -> None:
    assert embedding_layers(make_unet(addition_embed_type=None).config) == []


def test_gradients_reach_the_gains_with_and_without_checkpointing(
    make_unet: Callable[..., Any],
) -> None:
    found = []
    for checkpointing in (False, True):
        unet = make_unet().requires_grad_(False).train()
        if checkpointing:
            unet.enable_gradient_checkpointing(checkpoint_in_pass)
        guide = Pusher(unet, 0.3)
        for gain in guide.gains.values():
            gain.requires_grad_(True)
        install(guide, unet)
        negative = negative_prompt(unet)
        with GuidedPass(guide, lambda: 4.0, lambda n=negative: n).open():
            made = call(unet, prompt(unet))
        made.square().mean().backward()
        found.append([gain.grad for gain in guide.gains.values()])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)
