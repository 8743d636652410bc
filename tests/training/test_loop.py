"""Stage 1 as its user meets it: it learns, and says so where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import TextConditions
from pilotfish.training import guidance_stage
from pilotfish.training.checkpoints import list_checkpoints
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.guidance_stage import GuidanceDistillation
from pilotfish.training.kinds import KINDS
from pilotfish.training.loop import DistillError
from pilotfish.training.material import Material
from pilotfish.training.precision import slowed_by
from pilotfish.training.stages import distill
from pilotfish.training.trained import settings
from tests.training.runs import same, train


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("processor", ["AVX2", "AVX512", "DEFAULT"])
def test_precision_that_a_processor_only_imitates_is_noted(
    processor: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    line = slowed_by(precision, torch.device("cpu"))
    assert (line is not None) == (processor == "AVX2" and precision != "no")
    assert line is None or precision in line
    assert slowed_by(precision, torch.device("cuda")) is None


def test_training_begins_with_that_note(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.training.loop.slowed_by", lambda precision, device: precision)
    given, told = material("epsilon"), list[str]()
    guide = TinyGuide.for_denoiser(given.pipe.unet, "epsilon", rank=4)
    GuidanceDistillation(config, given, guide, notice=told.append)
    assert told == ["no"]


def test_a_guide_is_trained_further(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What it begins with is the guide that is named, which has to be what is asked for."""
    made, began = material("epsilon"), list[Guide]()

    class Watched(GuidanceDistillation):
        def run(self) -> Guide:
            began.append(deepcopy(self.guide))
            return super().run()

    monkeypatch.setattr(Material, "of", lambda config, pictures: made)
    monkeypatch.setattr("pilotfish.training.stages.GuidanceDistillation", Watched)
    config = replace(config, rank=4, head=0, max_train_steps=2)
    first = distill(config)
    again = replace(
        config, output_dir=str(tmp_path / "again"), begin_with=str(tmp_path / "run/guide")
    )
    further = distill(again)
    assert not same(began[0], first)
    assert same(began[1], first)
    assert not same(further, first)
    unsaid = replace(again, output_dir=str(tmp_path / "unsaid"), rank=28, head=48)  # the defaults
    assert same(distill(unsaid), further)
    assert replace(unsaid, rank=4, head=0) == settings(tmp_path / "unsaid")
    with pytest.raises(ConfigError, match="guide cannot be trained further so: its rank is 4, 8"):
        distill(replace(again, rank=8))
    with pytest.raises(ConfigError, match=r"so: its kind is tiny, full is asked for$"):
        distill(replace(again, guide="full"))
    pictured = replace(config, output_dir=str(tmp_path / "p"), negative=True, head=8, picture=2)
    seen = distill(pictured)
    also = replace(config, output_dir=str(tmp_path / "also"), begin_with=str(tmp_path / "p/guide"))
    assert not same(distill(replace(also, head=48, picture=2)), seen)  # what it has may be said
    with monkeypatch.context() as patch:
        patch.delitem(KINDS, "tiny")  # a kind that nobody has given a name
        with pytest.raises(ConfigError, match="guide must be"):
            distill(again)
    for other in ({"begin_with": None}, {"states": "student"}):
        (name,) = other
        with pytest.raises(ConfigError, match=f"cannot be gone on with so: its {name} is "):
            distill(replace(again, resume="latest", **other))


@pytest.mark.parametrize("kind", ["dice", "cfg-lora"])
def test_a_guide_of_one_scale_is_trained_further(
    kind: Any, config: DistillConfig, material: Callable[[str], Material], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """At that scale, whatever range its dial has."""
    made = material("epsilon")
    monkeypatch.setattr(Material, "of", lambda config, pictures: made)
    one = {"guidance_scale_min": 3.0, "guidance_scale_max": 3.0}
    distill(replace(config, guide=kind, max_train_steps=2, **one))
    again = replace(
        config, output_dir=str(tmp_path / "again"), begin_with=str(tmp_path / "run/guide")
    )
    assert distill(again).config["trained_scale"] == 3.0
    assert settings(tmp_path / "again") == replace(again, guide=kind, **one)
    with pytest.raises(ConfigError, match=r"its guidance_scale_min is 3\.0, 2\.0 is asked for"):
        distill(replace(again, guidance_scale_min=2.0, guidance_scale_max=2.0))


def test_the_student_is_shown_the_negative_prompts_of_its_states(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[torch.Tensor, TextConditions]] = []
    plain = GuidanceDistillation.texts

    def texts(self: Any, prompt: torch.Tensor, negative: torch.Tensor) -> Any:
        both = plain(self, prompt, negative)
        shown.append((negative, both[1]))
        return both

    monkeypatch.setattr(GuidanceDistillation, "texts", texts)
    given = material("epsilon")
    with_them = train(replace(config, negative_share=1.0), given)
    for negative, embeds in shown:
        assert (negative >= 0).all()
        assert torch.equal(embeds.hidden_states, given.texts(negative).hidden_states)
    assert len(shown) == config.max_train_steps
    elsewhere = replace(config, output_dir=f"{config.output_dir}-null")
    assert not same(with_them, train(elsewhere, given))
    with pytest.raises(ConfigError, match=r"its negative_share is 1\.0, 0\.5 is asked for"):
        train(replace(config, negative_share=0.5, resume="latest"), given)


def test_another_seed_gives_other_weights(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path
) -> None:
    one = train(config, material("epsilon"))
    other = replace(config, seed=1, output_dir=str(tmp_path / "other"))
    assert not same(one, train(other, material("epsilon")))


def test_it_learns(
    config: DistillConfig, material: Callable[[str], Material], prediction_type: str
) -> None:
    config = replace(config, max_train_steps=240, validation_steps=80, checkpointing_steps=400,
                     learning_rate=1e-2)  # fmt: skip
    train(config, material(prediction_type))
    history = json.loads((Path(config.output_dir) / "history.json").read_text())
    errors = [row["guidance_error"] for row in history]
    assert [row["step"] for row in history] == [80, 160, 240]
    assert errors[-1] < 0.9
    assert (Path(config.output_dir) / "validation" / "step-240.png").is_file()


def test_saved_guide_is_the_averaged_one(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    guide = train(config, material("epsilon"))
    saved = Guide.from_pretrained(Path(config.output_dir) / "guide")
    assert same(guide, saved)
    last = load_file(list_checkpoints(Path(config.output_dir))[-1] / "state.safetensors")
    raw = {k[6:]: v for k, v in last.items() if k.startswith("guide.")}
    assert any(not torch.equal(raw[k], v) for k, v in saved.state_dict().items())


def test_nan_stops_and_keeps_the_last_good_checkpoint(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = guidance_stage.relative_guidance_loss, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(guidance_stage, "relative_guidance_loss", broken)
    with pytest.raises(
        DistillError, match="nan at step 4; the last good checkpoint is checkpoint-2"
    ):
        train(config, material("epsilon"))
    assert [p.name for p in list_checkpoints(Path(config.output_dir))] == ["checkpoint-2"]


def test_a_base_that_changes_is_noticed(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuff = material("epsilon")
    real = guidance_stage.relative_guidance_loss

    def meddle(*args: Any) -> torch.Tensor:
        stuff.pipe.unet.conv_in.bias.data.add_(1e-3)
        return real(*args)

    monkeypatch.setattr(guidance_stage, "relative_guidance_loss", meddle)
    with pytest.raises(DistillError, match="base denoiser changed"):
        train(config, stuff)


def test_a_run_that_fails_leaves_no_hook(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuff = material("epsilon")

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(guidance_stage, "relative_guidance_loss", broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(config, stuff)
    modules = list(stuff.pipe.unet.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
