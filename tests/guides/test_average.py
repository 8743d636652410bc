"""The mean of several guides."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import cli
from pilotfish.backbones import Origin
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.guides.mean import mean_guide
from pilotfish.interface import GuideError


@pytest.fixture
def one(unet: Any, randomise: Any) -> Callable[..., TinyGuide]:
    """Makes a guide with weights of its own."""

    def make(**settings: Any) -> TinyGuide:
        made: TinyGuide = randomise(TinyGuide.for_denoiser(unet, "epsilon", **settings))
        return made

    return make


def moved(guide: Guide, by: float) -> Guide:
    """A copy with every weight moved."""
    other = deepcopy(guide)
    for parameter in other.parameters():
        parameter.data += by
    return other


def test_the_mean_of_one_guide_with_itself_is_that_guide(trained: Guide) -> None:
    made = mean_guide([trained] * 3)
    assert type(made) is type(trained)
    assert made.settings() == trained.settings()
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in trained.state_dict().items())


def test_the_mean_lies_in_the_middle_and_its_parts_stay(trained: Guide) -> None:
    before = deepcopy(trained.state_dict())
    made = mean_guide([moved(trained, 0.5), trained, moved(trained, -0.5), trained])
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])
        torch.testing.assert_close(made.state_dict()[name], value, rtol=0, atol=1e-6)


def test_halves_are_averaged_as_exactly_as_others(one: Callable[..., TinyGuide]) -> None:
    half = one(rank=4).half()
    made = mean_guide([half, half])
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert all(torch.equal(v.float(), made.state_dict()[k]) for k, v in half.state_dict().items())
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_what_differs_is_refused_by_name(one: Callable[..., TinyGuide], unet: Any) -> None:
    with pytest.raises(GuideError, match=r"guide 2 and the first .* differ in rank"):
        mean_guide([one(rank=4), one(rank=3)])
    with pytest.raises(GuideError, match="differ in kind"):
        mean_guide([one(), FullGuide.for_denoiser(unet, "epsilon")])
    elsewhere = one()
    elsewhere.register_to_config(trained_on=Origin("another/base").plain())
    with pytest.raises(GuideError, match="differ in base"):
        mean_guide([one(), elsewhere])
    with pytest.raises(GuideError, match="at least one"):
        mean_guide([])


def test_the_command_saves_the_mean_and_overwrites_nothing(
    one: Callable[..., TinyGuide], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = one(rank=4), one(rank=4), tmp_path / "mean"
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "b")
    flags = ["average", "--guides", str(tmp_path / "a"), str(tmp_path / "b"), "--output_dir"]
    assert cli.main([*flags, str(out), "--half"]) == 0
    made, expected = Guide.from_pretrained(out), mean_guide([first, second]).half()
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in expected.state_dict().items())
    assert cli.main([*flags, str(out)]) == 1
    assert "not empty" in capsys.readouterr().err
