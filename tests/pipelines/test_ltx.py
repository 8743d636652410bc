"""LTX-Video that begins with an image: each of its tokens has a timestep of its own."""

from __future__ import annotations

from typing import Any

import torch

from tests.pipelines.pipelines import build, guide
from tests.pipelines.specs import SIDE

NAME = "LTX"


def test_a_video_that_begins_with_an_image() -> None:
    one = build(NAME, "LTXImageToVideoPipeline")
    generator = torch.Generator().manual_seed(9)
    call: dict[str, Any] = {"image": torch.rand(2, 3, 2 * SIDE, 2 * SIDE, generator=generator)}
    none, cfg = one.latents(guidance_scale=1.0, **call), one.latents(**call)
    with guide(NAME, trained=False).attached(one.pipe), one.batches() as sizes:
        assert torch.equal(one.latents(**call), none)
    assert set(sizes) == {2}
    with guide(NAME).attached(one.pipe):
        assert not torch.allclose(one.latents(**call), none, atol=1e-3)
    with guide(NAME).attached(one.pipe, refresh=1.0):
        torch.testing.assert_close(one.latents(**call), cfg, atol=1e-4, rtol=1e-4)
    assert torch.equal(one.latents(**call), cfg)
