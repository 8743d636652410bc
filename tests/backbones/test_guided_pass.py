"""A guided pass leaves nothing undone that the guide was to add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from baselines import GuidanceLoRA
from pilotfish import GuideError, TinyGuide
from pilotfish.backbones import GuidedPass, install
from pilotfish.guides import Guide
from pilotfish.interface import TextConditions


def call(guide: Guide, unet: UNet2DConditionModel, scale: float = 4.0) -> Any:
    text = torch.randn(2, 8, 16)
    with torch.no_grad(), GuidedPass(guide, lambda: scale, lambda: TextConditions(text[:1])).open():
        return unet(torch.randn(2, 4, 8, 8), torch.tensor(10), text)


def test_layers_that_are_skipped_are_noticed(unet: UNet2DConditionModel) -> None:
    guide = TinyGuide.for_denoiser(unet, "epsilon")
    install(guide, unet)
    call(guide, unet)
    unet.up_blocks[0].attentions[0].forward = lambda hidden, *_, **__: (hidden,)
    with pytest.raises(GuideError, match=r"went past up_blocks\.0\.attentions\.0\.transformer"):
        call(guide, unet)
    call(guide, unet, scale=1.0)


def test_fused_projections_are_noticed_by_a_guide_that_adds_to_them(
    unet: UNet2DConditionModel,
) -> None:
    guide = GuidanceLoRA.for_denoiser(unet, "epsilon")
    install(guide, unet)
    call(guide, unet)
    unet.fuse_qkv_projections()
    with pytest.raises(GuideError, match=r"went past .*\.to_"):
        call(guide, unet)
