"""Denoisers that read an image in addition to the one, or the video, that they generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.interface import GuideError, GuideOutput, TextConditions
from tests import components
from tests.backbones.stubs import TIME, FixedGuide, equal_gains

QWEN, WAN = components.FAMILIES["qwen"], components.FAMILIES["wan"]
WAN_TEXT = 512
"""Tokens of the text, where the denoiser reads an image as well."""


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 11])
@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}])
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_an_edited_image(
    config: dict[str, Any], length: int
) -> None:
    """Whose tokens follow those of the latents; their own predictions are not used."""
    denoiser, text, negative = QWEN.denoiser(**config), QWEN.text(2), QWEN.text(1, length, seed=3)
    tokens = torch.randn(2, 6 * 4 + 2 * 5, 4, generator=torch.Generator().manual_seed(8))

    def call(given: TextConditions) -> torch.Tensor:
        made: torch.Tensor = denoiser(
            tokens, given.embeds, given.mask, TIME, [[(1, 6, 4), (1, 2, 5)]] * 2, return_dict=False
        )[0]
        return made[:, : 6 * 4]

    unconditional, conditional = call(negative[torch.tensor([0, 0])]), call(text)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)))
    hooks = Backbone.of(denoiser).install(guide)  # type: ignore[arg-type]
    with GuidedPass(guide, lambda: 4.0, lambda: negative).open():  # type: ignore[arg-type]
        made = call(text)
    torch.testing.assert_close(made, unconditional, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(made, conditional, atol=1e-4)
    assert guide.inputs[0].latents.shape == (2, 4, 6, 4)
    hooks.remove()


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, {"image_dim": 8, "added_kv_proj_dim": 24}])
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_an_image_to_video(
    config: dict[str, Any],
) -> None:
    """The image's channels and its tokens in cross-attention are the same in both passes."""
    denoiser = WAN.denoiser(in_channels=10, out_channels=4, **config)
    text, negative = WAN.text(2, WAN_TEXT), WAN.text(1, WAN_TEXT, seed=3)
    random = torch.Generator().manual_seed(8)
    latents = torch.randn(2, 10, 2, 8, 8, generator=random)
    image = torch.randn(2, 3, 8, generator=random) if config else None

    def call(given: TextConditions) -> torch.Tensor:
        made: torch.Tensor = denoiser(latents, 1000 * TIME, given.embeds, image, return_dict=False)[
            0
        ]
        return made

    unconditional, conditional = call(negative[torch.tensor([0, 0])]), call(text)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)))
    Backbone.of(denoiser).install(guide)  # type: ignore[arg-type]
    with GuidedPass(guide, lambda: 4.0, lambda: negative).open():  # type: ignore[arg-type]
        torch.testing.assert_close(call(text), unconditional, atol=1e-5, rtol=1e-4)
        denoiser.fuse_qkv_projections()
        if config:  # the image's values are not to be seen
            with pytest.raises(GuideError, match=r"went past blocks\.0\.attn2"):
                call(text)
        else:
            torch.testing.assert_close(call(text), unconditional, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(conditional, unconditional, atol=1e-4)
    assert guide.inputs[0].latents.shape == (2, 16, 8, 4)
