"""Anything as an argument: it is taken, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"output_dir": "a", "rank": 2.5}', "rank must be a whole number"),
        ('{"output_dir": "a", "push": 1}', "push must be true or false"),
        ('{"output_dir": 3}', "output_dir must be text"),
        ('{"output_dir": "a\\u0000"}', "output_dir must be text"),
        ('{"output_dir": "a", "learning_rate": Infinity}', "learning_rate must be a number"),
        ('{"output_dir": "a", "ema_decay": NaN}', "ema_decay must be a number"),
        ('{"output_dir": "a", "max_grad_norm": true}', "max_grad_norm must be a number"),
        ('{"output_dir": "a", "practice": "fluent"}', "practice must be a list"),
        ('{"output_dir": "a", "practice": [1]}', "practice must be a list, each of it text"),
        ('{"output_dir": "a", "streams": "2"}', "streams must be a whole number or nothing"),
        ('{"output_dir": "a", "lr_scheduler": "steep"}', "lr_scheduler must be one of linear"),
        ('{"output_dir": "a", "seed": 8388608}', "seed must be at least 0 and below 8388608"),
        ("[" * 100_000, "no configuration could be read"),
        ("\xff", "no configuration could be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words) as caught:
        DistillConfig.load(path)
    assert str(path) in str(caught.value)


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
