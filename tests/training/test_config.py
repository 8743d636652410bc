"""Settings: every invalid one is named in a sentence, and what is saved is what is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import baselines  # noqa: F401
from pilotfish.cli.settings import parse
from pilotfish.guides import Guide, TinyGuide
from pilotfish.guides.base import NoSettings
from pilotfish.guides.external import ExternalSettings
from pilotfish.guides.tiny import TinySettings
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"train_batch_size": 0}, "train_batch_size must be above 0, not 0"),
        ({"seed": 2.5}, "seed must be a valid integer, not 2.5"),
        ({"max_grad_norm": True}, "max_grad_norm must be a valid number, not True"),
        ({"ema_decay": float("nan")}, "ema_decay must be a finite number, not nan"),
        ({"learning_rate": 0}, "learning_rate must be above 0, not 0"),
        ({"train_finetunes": "a"}, "train_finetunes must be a valid list, not 'a'"),
        ({"train_finetunes": (1,)}, "train_finetunes[0] must be a valid string, not 1"),
        ({"lr_scheduler": "steep"}, "lr_scheduler must be 'linear', 'cosine', 'cosine_with_resta"),
        ({"prompts": "a\0"}, "prompts must not contain a NUL character, not 'a\\x00'"),
        ({"colour": 1, "age": 2}, "unknown settings: age, colour"),
        ({"guidance_scale_max": 1}, "guidance_scale_max must be above 1 and at least guidance_sca"),
        ({"pool": 8}, "pool must be at least train_batch_size, 64, not 8"),
        ({"base_dtype": "fp16"}, "base_dtype must be bf16 or fp32 without --mixed_precision fp16"),
        ({"guide_type": "huge"}, "guide_type must be one of external, full, tiny"),
        ({"guide": {"rank": "4"}}, "rank must be a valid integer, not '4'"),
        ({"guide": {"rank": -4}}, "rank must be at least 0, not -4"),
        ({"guide": {"rounds": 2}}, "unknown settings: rounds"),
        ({"guide": ExternalSettings()}, "guide must be TinySettings for guide_type tiny, not Ext"),
        ({"guide": 3}, "guide must be settings of tiny, not 3"),
        ({"trajectory_steps_min": 40}, "trajectory_steps_min must be at most trajectory_steps_max"),
    ],
)  # fmt: skip
def test_what_is_invalid_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DistillConfig(**{"output": "runs", **values})
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": ()}, "steps must be a list of numbers, each half of the one before, not ()"),
        ({"steps": (8, 5)}, "steps must be a list of numbers"),
        ({"steps": (0,)}, "steps[0] must be above 0"),
        ({"teacher_scale_multiplier": 1.5}, "teacher_scale_multiplier must be 1 unless the teach"),
    ],
)
def test_what_is_invalid_in_stage_2_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StepsConfig(**{"output": "runs", **values})
    assert str(caught.value).startswith(sentence)


def test_settings_are_saved_nested_and_loaded(tmp_path: Path) -> None:
    for config in (
        DistillConfig(output="a", guide=TinySettings(rank=19, text=False)),
        DistillConfig(output="a", guide_type="external", guide={"rounds": 2}),
        DistillConfig(output="a", guide_type="full", train_finetunes=("x", "y")),
        StepsConfig(output="a", steps=(8, 4)),
    ):
        config.save(tmp_path / "config.json")
        assert type(config).load(tmp_path / "config.json") == config
    saved = DistillConfig(output="a", guide=TinySettings(rank=19))
    saved.save(tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["guide_type"] == "tiny"
    assert values["guide"]["rank"] == 19
    assert replace(saved, guide_type="full", guide=None).guide == NoSettings()
    for text in ("[" * 100_000, "\xff", "3", '{"output": 3}', '{"seed": 1}'):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ConfigError, match=r"config\.json"):
            DistillConfig.load(tmp_path / "config.json")


def test_flags_are_flat_and_those_of_the_chosen_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def parsed(*flags: str) -> DistillConfig:
        return parse(flags, DistillConfig, "distill", "")

    flags = ("--output", "a", "--rank", "19", "--uncond_templates=16", "--no_text")
    expected = TinySettings(rank=19, uncond_templates=16, text=False)
    assert parsed(*flags).guide == expected
    external = parsed("--guide_type=external", "--output", "a", "--rounds", "2")
    assert external.guide == ExternalSettings(rounds=2)
    external.save(tmp_path / "config.json")
    file = ("--config", str(tmp_path / "config.json"))
    assert parsed(*file, "--seed", "3") == replace(external, seed=3)
    assert parsed(*file, "--guide_type", "tiny").guide == TinySettings()
    for wrong in (
        (*file, "--head", "3"),
        ("--output", "a", "--guide_type", "full", "--rank=3"),
    ):
        with pytest.raises(SystemExit):
            parsed(*wrong)
    with pytest.raises(ConfigError, match=r"guide_type must be one of .*, not 'huge'"):
        parsed("--guide_type", "huge", "--help")
    with pytest.raises(ConfigError, match="rank must be at least 0, not -3"):
        parsed("--output", "a", "--rank", "-3")
    with pytest.raises(ConfigError, match="--config needs a value"):
        parsed("--output", "a", "--config")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        parsed("--help")
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--uncond_templates" in told
    assert "Fine-tunes of the base to train on" in told
    assert "--rounds" not in told


def test_a_new_guide_type_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class ToySettings:
        size: int = 2

    monkeypatch.setattr(Guide, "registry", dict(Guide.registry))

    class Toy(TinyGuide, guide_type="toy", settings=ToySettings):
        pass

    flags = ("--output", "a", "--guide_type", "toy", "--size", "3")
    assert parse(flags, DistillConfig, "distill", "").guide == ToySettings(3)


def test_a_guide_of_one_scale_is_trained_at_it() -> None:
    def scales(**settings: Any) -> tuple[float, float, float]:
        config = DistillConfig(output="a", guide_type="dice", **settings)
        low, high = config.guidance_scale_min, config.guidance_scale_max
        return low, high, config.guide.trained_scale

    assert scales() == (4, 4, 4)
    assert scales(guide={"trained_scale": 3.0}) == (3, 3, 3)
    assert scales(guidance_scale_min=2.0, guidance_scale_max=2.0) == (2, 2, 2)
    wrong: Any
    for wrong in (
        {"guidance_scale_min": 2.0},
        {"guidance_scale_min": 2.0, "guidance_scale_max": 2.0, "guide": {"trained_scale": 3.0}},
    ):
        with pytest.raises(ConfigError, match="must be the trained_scale for dice"):
            scales(**wrong)
