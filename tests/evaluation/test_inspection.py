"""What a guide adds can be looked at, and looking changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import cli
from pilotfish.evaluation.inspection import inspect
from pilotfish.guides import ExternalGuide, Guide, TinyGuide
from pilotfish.pipelines.sampling import sample

STEPS = 3


@pytest.fixture
def pipe(make_pipe: Callable[[str], Any]) -> Any:
    return make_pipe("epsilon")


@pytest.fixture
def guide(pipe: Any, randomise: Any) -> Guide:
    made: Guide = randomise(TinyGuide.for_denoiser(pipe.unet, "epsilon", rank=4))
    return made


def look(pipe: Any, guide: Guide, scales: tuple[float, ...] = (2.0, 6.0)) -> list[Any]:
    return inspect(pipe, guide, ["a cat"], guidance_scales=scales, num_inference_steps=STEPS)


def test_every_site_is_seen_in_every_step(pipe: Any, guide: Guide) -> None:
    found = look(pipe, guide)
    sites = {"text", *guide.target_modules}
    assert {a.site for a in found} == sites
    assert len(found) == 2 * STEPS * len(sites)
    assert {a.guidance_scale for a in found} == {2.0, 6.0}
    maps = [a.map for a in found if a.site == "conv_out"]
    assert all(m is not None and m.shape == (8, 8) for m in maps)


def test_skips_and_mid_block_are_sites_too(pipe: Any, randomise: Any) -> None:
    guide = randomise(ExternalGuide.for_denoiser(pipe.unet, "epsilon"))
    sites = {a.site for a in look(pipe, guide)}
    assert "mid block" in sites
    assert "skip 0" in sites


def test_a_fresh_guide_adds_nothing(pipe: Any) -> None:
    fresh = TinyGuide.for_denoiser(pipe.unet, "epsilon", rank=4)
    assert all(a.strength == 0 for a in look(pipe, fresh))


def test_more_is_added_at_a_larger_scale(pipe: Any, guide: Guide) -> None:
    found = look(pipe, guide)
    for site in guide.target_modules:
        first = {a.guidance_scale: a.strength for a in found[::-1] if a.site == site}
        assert first[6.0] > first[2.0] > 0


def test_looking_changes_nothing(pipe: Any, guide: Guide) -> None:
    def draw() -> torch.Tensor:
        (one,) = sample(pipe, ["a cat"], seeds=[0], guidance_scale=4.0,
                        num_inference_steps=STEPS, guide=guide)  # fmt: skip
        return one.latents

    before = draw()
    look(pipe, guide)
    assert torch.equal(draw(), before)
    assert not guide._forward_hooks


def test_the_command_draws_maps_and_strength(pipe: Any, guide: Guide, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    guide.save_pretrained(tmp_path / "guide")
    flags = (
        "--guide", str(tmp_path / "guide"), "--models",
        str(tmp_path / "base"), "--num_inference_steps", "3", "-p", "a cat",
    )  # fmt: skip
    assert cli.main(["inspect", *flags, "--output", str(tmp_path / "out")]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"maps.png", "strength.png"}
    wrong = ("--site", "attic", "--output", str(tmp_path / "none"))
    assert cli.main(["inspect", *flags, *wrong]) == 1
