"""Pipelines of Qwen-Image that take one prompt at a time, or another denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from pilotfish import GuideError
from tests import components, editing
from tests.pipelines.pipelines import Pipeline, build, guide
from tests.pipelines.specs import SIDE
from tests.pipelines.test_refresh import ALL

CHANNELS = {"in_channels": 16, "out_channels": 4}


def plus(**config: Any) -> tuple[Pipeline, dict[str, Any]]:
    """One that edits two images together, and the arguments of its call."""
    parts = {"transformer": components.qwen_transformer(**CHANNELS | config)}
    one = build("Qwen-Image edit", "QwenImageEditPlusPipeline", **parts)
    call = {"prompt": ["cat"], "negative_prompt": ["a"], "image": one.images["image"]}
    return one, call


def inpaint() -> tuple[Pipeline, dict[str, Any]]:
    """One that edits a part of an image, and the arguments of its call."""
    one = build("Qwen-Image edit", "QwenImageEditInpaintPipeline")
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE, SIDE // 2))
    call = {
        "prompt": ["cat"], "negative_prompt": ["a"], "image": one.images["image"][:1],
        "mask_image": mask, "strength": 1.0, "height": editing.SIDE, "width": editing.SIDE,
    }  # fmt: skip
    return one, call


@pytest.mark.parametrize(
    "make", [plus, inpaint, lambda: plus(zero_cond_t=True)], ids=["plus", "inpaint", "plus, 2511"]
)
def test_editing(make: Callable[[], tuple[Pipeline, dict[str, Any]]]) -> None:
    """The images' tokens follow the latents', with zero_cond_t at a time of their own."""
    one, call = make()
    conditional, cfg = one.latents(guidance_scale=1.0, **call), one.latents(**call)
    with guide("Qwen-Image", trained=False).attached(one.pipe), one.batches() as sizes:
        assert torch.equal(one.latents(**call), conditional)
    assert sizes == [1, 1]
    with guide("Qwen-Image").attached(one.pipe):
        assert not torch.allclose(one.latents(**call), conditional)
    with guide("Qwen-Image").attached(one.pipe, refresh=ALL), one.batches() as sizes:
        torch.testing.assert_close(one.latents(**call), cfg, rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2]
    assert torch.equal(one.latents(**call), cfg)


def test_the_controlnet_runs_once_on_the_prompt() -> None:
    one = build("Qwen-Image ControlNet")
    sizes: list[int] = []
    one.pipe.controlnet.register_forward_pre_hook(
        lambda net, args, given: sizes.append(len(given["encoder_hidden_states"])),
        with_kwargs=True,
    )
    with guide("Qwen-Image ControlNet").attached(one.pipe, refresh=[1]), one.batches() as batches:
        one.latents()
    assert batches == [2, 4]
    assert sizes == [2, 2]


def test_several_layers_of_an_image_are_refused() -> None:
    parts = build("Qwen-Image edit").pipe.components
    parts["transformer"] = components.qwen_transformer(use_additional_t_cond=True)
    pipe = diffusers.QwenImageLayeredPipeline(**parts)
    with pytest.raises(GuideError, match="LayeredPipeline cannot take a guide: its denoiser gen"):
        guide("Qwen-Image").attach(pipe)
