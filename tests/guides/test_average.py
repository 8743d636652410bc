"""The average of several guides."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pilotfish import cli
from pilotfish.backbones import Origin
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.guides.average import average_guides
from pilotfish.interface import GuideError
from tests import components


def moved(guide: Guide, by: float) -> Guide:
    """A copy with another value of every weight."""
    other = deepcopy(guide)
    for parameter in other.parameters():
        parameter.data += by
    return other


def test_the_average_of_one_guide_with_itself_is_that_guide(trained: Guide) -> None:
    made = average_guides([trained] * 3)
    assert type(made) is type(trained)
    assert made.settings() == trained.settings()
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in trained.state_dict().items())


def test_the_average_is_the_mean_of_the_weights_and_changes_no_guide(trained: Guide) -> None:
    before = deepcopy(trained.state_dict())
    made = average_guides([moved(trained, 0.5), trained, moved(trained, -0.5), trained])
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])
        torch.testing.assert_close(made.state_dict()[name], value, rtol=0, atol=1e-6)


def test_the_ratio_that_a_guide_recommends_is_none_of_its_settings(trained: Guide) -> None:
    other = deepcopy(trained)
    other.register_to_config(refresh_ratio=0.12)
    assert other.refresh_ratio == 0.12
    assert average_guides([trained, other]).refresh_ratio == trained.refresh_ratio == 0


def test_half_precision_is_averaged_in_full(unet: UNet2DConditionModel) -> None:
    half = components.randomise(TinyGuide.for_denoiser(unet, "epsilon", rank=4)).half()
    made = average_guides([half, half])
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert all(torch.equal(v.float(), made.state_dict()[k]) for k, v in half.state_dict().items())
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_what_differs_is_refused_by_name(unet: UNet2DConditionModel) -> None:
    def tiny(**settings: Any) -> TinyGuide:
        return TinyGuide.for_denoiser(unet, "epsilon", **settings)

    with pytest.raises(GuideError, match=r"guide 2 and the first .* differ in rank"):
        average_guides([tiny(rank=4), tiny(rank=3)])
    with pytest.raises(GuideError, match="differ in type"):
        average_guides([tiny(), FullGuide.for_denoiser(unet, "epsilon")])
    with pytest.raises(GuideError, match="differ in base"):
        average_guides([tiny(), tiny(trained_on=Origin("another/base").plain())])
    with pytest.raises(GuideError, match="at least one"):
        average_guides([])


def test_the_command_saves_the_average_and_overwrites_nothing(
    unet: UNet2DConditionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guides = []
    for seed in (1, 2):
        guide = TinyGuide.for_denoiser(unet, "epsilon", rank=4)
        guides.append(components.randomise(guide, seed))
        guide.save_pretrained(tmp_path / str(seed))
    output = tmp_path / "average"
    arguments = ["average", "--guides", str(tmp_path / "1"), str(tmp_path / "2"), "--output"]
    assert cli.main([*arguments, str(output), "--half"]) == 0
    made, expected = Guide.from_pretrained(output), average_guides(guides).half()
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in expected.state_dict().items())
    assert cli.main([*arguments, str(output)]) == 1
    assert "not empty" in capsys.readouterr().err
