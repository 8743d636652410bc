"""Attach and detach: what a user writes, and what is left when something goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

import pilotfish
from pilotfish import Guide, GuideError
from tests.pipelines.pipelines import Pipeline, build, guide, guided, plain
from tests.pipelines.specs import SIDE


@pytest.fixture
def one() -> Pipeline:
    return build("SD")


def test_attach_gives_the_guide_back(one: Pipeline, tmp_path: Path) -> None:
    """``guide = Guide.from_pretrained(...).attach(pipe)`` can be detached."""
    guide("SD").save_pretrained(tmp_path)
    loaded = Guide.from_pretrained(tmp_path).attach(one.pipe)
    # weights read from a file lie elsewhere in memory, which a matrix product may round by
    torch.testing.assert_close(one.latents(), guided("SD"), atol=1e-3, rtol=1e-4)
    loaded.detach(one.pipe)
    assert torch.equal(one.latents(), plain("SD"))


def test_a_pipeline_is_detached_without_its_guide_at_hand(one: Pipeline) -> None:
    guide("SD").attach(one.pipe)
    pilotfish.detach(one.pipe)
    assert torch.equal(one.latents(), plain("SD"))
    assert one.hooks() == 0
    with pytest.raises(GuideError, match=r"^no guide is attached to this pipeline$"):
        pilotfish.detach(one.pipe)


def test_only_the_guide_that_is_attached_can_be_detached(one: Pipeline) -> None:
    used, other = guide("SD"), guide("SD", seed=4)
    with pytest.raises(GuideError, match="no guide is attached"):
        used.detach(one.pipe)
    with used.attached(one.pipe):
        with pytest.raises(GuideError, match="not attached to this pipeline; another is"):
            other.detach(one.pipe)
        with pytest.raises(GuideError, match="this pipeline has a guide already; detach it first"):
            other.attach(one.pipe)
        assert torch.equal(one.latents(), guided("SD"))


def test_the_block_detaches_after_an_error(one: Pipeline) -> None:
    plain_class = type(one.pipe)
    with pytest.raises(RuntimeError, match="on purpose"), guide("SD").attached(one.pipe):
        raise RuntimeError("on purpose")
    assert type(one.pipe) is plain_class
    assert torch.equal(one.latents(), plain("SD"))


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_a_call_that_fails_leaves_the_guide_working(name: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    one = build(name)
    with guide(name).attached(one.pipe):
        with pytest.raises(RuntimeError, match="on purpose"):
            one.latents(callback_on_step_end=fail)
        with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
            one.latents(prompt=None)
        assert torch.equal(one.latents(), guided(name))
    assert torch.equal(one.latents(), plain(name))


@pytest.mark.parametrize("name", ["SD", "SD3", "PixArt-Sigma"])
def test_the_scale_reaches_the_guide_as_it_is(name: str) -> None:
    one, used = build(name), guide(name)
    seen: list[float] = []
    used.register_forward_pre_hook(lambda _, args: seen.extend(args[0].guidance_scale.tolist()))
    with used.attached(one.pipe):
        one.latents("cat", guidance_scale=2.75)
    assert seen == [2.75] * 2


@pytest.mark.parametrize("name", ["SD", "PixArt-Sigma"])
def test_a_scale_outside_the_trained_range_warns(name: str) -> None:
    one, used = build(name), guide(name)
    with (
        used.attached(one.pipe),
        pytest.warns(UserWarning, match=r"guidance_scale 9.0 lies outside \[1.0, 8.0\]"),
    ):
        one.latents(guidance_scale=9.0)


@pytest.mark.parametrize("name", ["SD", "PixArt-Sigma"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1e300])
def test_a_scale_that_is_no_finite_number_is_refused(name: str, scale: float) -> None:
    one = build(name)
    with (
        guide(name).attached(one.pipe),
        pytest.raises(GuideError, match="guidance_scale must be a finite number"),
    ):
        one.latents(guidance_scale=scale)


def test_one_guide_serves_another_pipeline_around_the_denoiser(one: Pipeline) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**one.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    other = Pipeline(pipe, {"image": torch.rand(2, 3, SIDE, SIDE)}, {"strength": 1.0})
    with guide("SD").attached(pipe), other.batches() as sizes:
        other.latents()
        assert sizes == [2, 2]
