"""A guide as guider: every family that has a modular pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.qwenimage import encoders

from pilotfish.backbones import Backbone
from tests import components, editing
from tests.modular.pipelines import NAMES, W, build, guider
from tests.pipelines.pipelines import guide

Saved = Callable[..., Path]
SOME, ALL = [1], 1.0
"""Refreshes in some steps, and in all."""


@pytest.mark.parametrize("name", NAMES)
def test_idle_it_is_the_conditional_pipeline(name: str, saved: Saved) -> None:
    one = build(name)
    conditional, trained = one.conditional(), saved(name)
    with one.batches() as sizes:
        assert torch.equal(one.latents(guider(one, saved(name, trained=False))), conditional)
    assert sizes == [2, 2, 2], "one call a step at batch N"
    off = guider(one, trained, guidance_scale=0.0 if name == "Z-Image" else 1.0, refresh=ALL)
    assert torch.equal(one.latents(off), conditional)
    assert torch.equal(one.latents(guider(one, trained, stop=0.0, refresh=ALL)), conditional)
    assert off._shared.guide is None, "nor is the guide loaded"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_guide_on_the_standard_pipeline(name: str, saved: Saved) -> None:
    """Bit for bit, with the modulations of the whole schedule and what a refresh found."""
    one, used = build(name), guide(name)
    alone, some = guider(one, saved(name)), guider(one, saved(name), refresh=SOME)
    with one.batches() as sizes:
        found = one.latents(alone)
    assert sizes == [2, 2, 2]
    assert torch.equal(found, one.attached(used, 0))
    assert torch.equal(one.latents((some, some.new())), one.attached(used, SOME))
    other = one.latents(alone, negative_prompt=["x", "y"])
    assert not torch.allclose(found[0], other[0])
    assert not torch.allclose(found[1], other[1])
    assert one.one.hooks() == 0
    assert alone._call is None
    assert alone._placed is None


@pytest.mark.parametrize("name", NAMES)
def test_with_a_refresh_at_every_step_it_is_cfg(
    name: str, saved: Saved, refreshes: list[int]
) -> None:  # fmt: skip
    one = build(name)
    with one.batches() as sizes:
        found = one.latents(guider(one, saved(name), refresh=ALL))
    assert (len(refreshes), sizes) == (3, [2, 2, 2]), "the pipeline sees a batch of N"
    torch.testing.assert_close(found, one.cfg(), rtol=1e-4, atol=1e-4)


def test_an_image_is_edited(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens follow those of the latents in every denoiser call."""
    side = editing.SIDE
    monkeypatch.setattr(encoders, "calculate_dimensions", lambda area, ratio: (side, side, None))
    name = "Qwen-Image edit"
    one = build(name)
    call = {"prompt": "cat", "negative_prompt": "red", "image": one.one.images["image"][0]}
    cfg = one.latents(ClassifierFreeGuidance(guidance_scale=W), **call)
    found = one.latents(guider(one, saved(name), refresh=ALL), **call)
    torch.testing.assert_close(found, cfg, rtol=1e-4, atol=1e-4)
    conditional = one.latents(ClassifierFreeGuidance(guidance_scale=W, stop=0.0), **call)
    assert torch.equal(one.latents(guider(one, saved(name, trained=False)), **call), conditional)
    assert not torch.allclose(one.latents(guider(one, saved(name)), **call), conditional)


def test_a_family_is_asked_without_a_standard_pipeline() -> None:
    """FLUX.2 has a modular pipeline, too, and says of a standard one what it refuses."""
    assert Backbone.of(components.FAMILIES["flux2"].denoiser()).refusal(None) is None
