"""Pipelines of Wan with two denoisers, or with an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pilotfish import GuideError
from pilotfish.guidance_error import pipeline_guidance_error
from pilotfish.pipelines.loading import share_weights
from tests import components
from tests.pipelines.pipelines import Pipeline, build, guide, guided, plain
from tests.pipelines.specs import PIPELINES
from tests.pipelines.test_refresh import ALL

STEPS = {"num_inference_steps": 4}
"""Two of each denoiser."""


def scales(one: Pipeline, **call: Any) -> list[float]:
    """Those that the guide is given."""
    seen: list[float] = []
    used = guide("Wan 2.2")
    used.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].guidance_scale[0])))
    with used.attached(one.pipe):
        one.latents(**STEPS, **call)
    return seen


def test_each_denoiser_has_its_scale() -> None:
    one = build("Wan 2.2")
    assert scales(one) == [4.0, 4.0, 3.0, 3.0]
    assert scales(one, guidance_scale_2=None) == [4.0] * 4
    assert scales(one, guidance_scale_2=1.0) == [4.0, 4.0]
    assert scales(one, guidance_scale=1.0) == [], "the first scale decides for both"
    with pytest.warns(UserWarning, match=r"guidance_scale_2 0.5 lies outside \["):
        assert scales(one, guidance_scale_2=0.5) == [4.0, 4.0]
    with pytest.raises(GuideError, match="guidance_scale_2 must be a finite number"):
        scales(one, guidance_scale_2=float("nan"))


@pytest.mark.parametrize("boundary_ratio", [0.0, 1.1])
def test_each_denoiser_alone_is_guided(boundary_ratio: float) -> None:
    one = build("Wan 2.2")
    one.pipe.register_to_config(boundary_ratio=boundary_ratio)
    conditional, cfg = one.latents(guidance_scale=1.0), one.latents()
    with guide("Wan 2.2").attached(one.pipe):
        assert not torch.allclose(one.latents(), conditional)
    with guide("Wan 2.2").attached(one.pipe, refresh=ALL):
        torch.testing.assert_close(one.latents(), cfg, rtol=1e-5, atol=1e-5)


def test_a_second_denoiser_of_another_shape_is_refused() -> None:
    one = build("Wan 2.2", transformer_2=components.wan_transformer(num_layers=3))
    with pytest.raises(GuideError, match="was made for another denoiser"):
        guide("Wan 2.2").attach(one.pipe)
    assert one.hooks() == 0


def test_the_guidance_error_of_two_denoisers_is_refused() -> None:
    with pytest.raises(GuideError, match="on one denoiser, and this WanPipeline has two"):
        pipeline_guidance_error(build("Wan 2.2").pipe, guide("Wan 2.2"), [])  # type: ignore[arg-type]


def test_one_denoiser_in_both_places_is_guided_once() -> None:
    one = build("Wan 2.2")
    one.pipe.transformer_2 = one.pipe.transformer
    single = build("Wan")
    with guide("Wan").attached(one.pipe), guide("Wan").attached(single.pipe):
        assert torch.equal(one.latents(guidance_scale_2=4.0), single.latents())


def test_the_second_denoiser_may_be_exchanged_or_shared() -> None:
    one = build("Wan 2.2")
    with guide("Wan 2.2").attached(one.pipe):
        other = Pipeline(share_weights(one.pipe), one.images, one.call)
        assert other.pipe.transformer_2 is not one.pipe.transformer_2
        assert torch.equal(other.latents(), guided("Wan 2.2"))
        before, one.pipe.transformer_2 = one.pipe.transformer_2, components.wan_transformer(2)
        assert not torch.allclose(one.latents(), guided("Wan 2.2"))
        one.pipe.transformer_2 = before
        assert torch.equal(one.latents(), guided("Wan 2.2"))
    assert one.hooks() == 0
    assert torch.equal(one.latents(), plain("Wan 2.2"))


def is_guided(one: Pipeline, name: str, **call: Any) -> None:
    """Fresh it is conditional, trained it is not, and with both passes in every step it is CFG."""
    conditional, cfg = one.latents(guidance_scale=1.0, **call), one.latents(**call)
    with guide(name, trained=False).attached(one.pipe), one.batches() as sizes:
        assert torch.equal(one.latents(**call), conditional)
    assert sizes == [2, 2]
    with guide(name).attached(one.pipe):
        assert not torch.allclose(one.latents(**call), conditional)
    with guide(name).attached(one.pipe, refresh=ALL):
        torch.testing.assert_close(one.latents(**call), cfg, rtol=1e-5, atol=1e-5)


def test_from_a_first_to_a_last_image() -> None:
    """Of which the denoiser is given two rows a sample."""
    name = "Wan 2.1 image-to-video"
    config = PIPELINES[name].denoiser | {"pos_embed_seq_len": 10}
    one = build(name, transformer=components.wan_transformer(**config))
    is_guided(one, name, last_image=one.images["image"].rotate(90))


def test_an_image_as_the_first_frame_at_a_time_of_its_own() -> None:
    """Wan 2.2 with 5 billion parameters."""
    parts: dict[str, Any] = {"transformer_2": None, "boundary_ratio": None}
    one = build(
        "Wan 2.2 image-to-video", transformer=components.wan_transformer(), expand_timesteps=True,
        **parts,
    )  # fmt: skip
    is_guided(one, "Wan", guidance_scale_2=None)
