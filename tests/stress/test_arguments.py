"""Anything as an argument: it is taken, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.training.config import DistillConfig, StepsConfig
from tests.stress.runs.arguments import (
    REFUSED,
    TAKEN,
    any_sides,
    guided_calls,
    prompts,
    scales,
    setting_files,
    tried,
)
from tests.stress.runs.result import EnduranceError


def quiet(what: str, done: int, total: int) -> None:
    pass


def both(outcomes: Any) -> bool:
    return outcomes[TAKEN] > 0 and outcomes[REFUSED] > 0


@pytest.mark.parametrize("kind", [DistillConfig, StepsConfig])
def test_any_file_is_settings_or_a_config_error(kind: Any, tmp_path: Path) -> None:
    assert both(tried(setting_files(kind, tmp_path), 300, "settings", quiet))


def test_any_guidance_scale_gives_something_finite_or_an_error(trained: Guide, pipe: Any) -> None:
    assert both(tried(guided_calls(pipe, trained, scales=scales), 40, "scales", quiet))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 10**400, 1e300])
def test_a_scale_that_is_no_number_is_refused(
    trained: Guide, pipe: Any, draw: Any, scale: float
) -> None:
    with trained.attached(pipe), pytest.raises(GuideError, match="must be a finite number"):
        draw(pipe, guidance_scale=scale)


@pytest.mark.filterwarnings("ignore:guidance_scale")
def test_a_scale_at_which_everything_overflows_is_refused(
    trained: Guide, pipe: Any, draw: Any
) -> None:
    with trained.attached(pipe):
        expected = draw(pipe)
        with pytest.raises(GuideError, match=r"3e\+38 is too far from \[1, 8\]"):
            draw(pipe, guidance_scale=3e38)
        assert draw(pipe).equal(expected)


def test_any_prompt_is_taken_as_the_plain_pipeline_takes_it(trained: Guide, pipe: Any) -> None:
    assert both(tried(guided_calls(pipe, trained, prompts=prompts), 40, "prompts", quiet))


def test_any_size_is_taken_as_the_plain_pipeline_takes_it(trained: Guide, pipe: Any) -> None:
    assert both(tried(guided_calls(pipe, trained, sides=any_sides(pipe)), 40, "sizes", quiet))


def test_a_guide_that_is_not_finite_fails_the_trial(fresh: Guide, pipe: Any) -> None:
    """So that the trials can fail."""
    for parameter in fresh.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(EnduranceError, match="not finite"):
        tried(guided_calls(pipe, fresh), 1, "calls", quiet)
