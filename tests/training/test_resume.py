"""A run that is cut off loses nothing, and goes on only as what it was."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate.state import AcceleratorState

from pilotfish.guides import Guide, TinyGuide
from pilotfish.training import guidance_stage
from pilotfish.training.checkpoints import CheckpointError, list_checkpoints
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.guidance_stage import GuidanceDistillation
from pilotfish.training.loop import Interrupted
from pilotfish.training.material import Material
from pilotfish.training.validation import GuidanceValidation
from tests.training.runs import PROMPTS, same, train


@pytest.mark.parametrize("states", ["noised", "trajectory", "student"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_equals_uninterrupted(
    config: DistillConfig, material: Callable[[str], Material], states: Any, accumulation: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = replace(config, states=states, gradient_accumulation_steps=accumulation)
    whole = train(config, material("epsilon"))
    path = str(Path(config.output_dir) / "checkpoint-2")
    again = replace(config, output_dir=str(tmp_path / "again"), resume=path)
    assert same(whole, train(again, material("epsilon")))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_half_precision_resumes_and_leaves_the_guide_whole(
    config: DistillConfig, material: Callable[[str], Material], precision: Any, tmp_path: Path
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the first precision
    config = replace(config, mixed_precision=precision)
    whole = train(config, material("v_prediction"))
    path = str(Path(config.output_dir) / "checkpoint-4")
    again = replace(config, output_dir=str(tmp_path / "again"), resume=path)
    assert same(whole, train(again, material("v_prediction")))
    assert whole.dtype == torch.float32
    plain = replace(config, output_dir=str(tmp_path / "plain"), mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert same(whole, train(plain, material("v_prediction"))) == (precision == "no")


def test_what_is_lowered_on_the_way_is_lowered(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path
) -> None:
    """Who resumes with another rate or average gets it, from there on."""
    config = replace(config, learning_rate=1e-2, lr_scheduler="constant", lr_warmup_steps=0)
    whole = train(config, material("epsilon"))
    path = str(Path(config.output_dir) / "checkpoint-4")

    def gone_on(name: str, **changes: Any) -> tuple[Guide, dict[str, Any]]:
        folder = tmp_path / name
        given = replace(config, output_dir=str(folder), resume=path, **changes)
        guide = train(given, material("epsilon"))
        return guide, json.loads((folder / "checkpoint-6" / "state.json").read_text())

    same_again, _ = gone_on("again")
    assert same(whole, same_again)
    slower, facts = gone_on("slower", learning_rate=1e-3)
    assert not same(whole, slower)
    assert facts["rate"]["base_lrs"] == facts["rate"]["_last_lr"] == [1e-3]
    other, facts = gone_on("other", ema_decay=0.1)
    assert not same(whole, other)
    assert facts["average"]["decay"] == 0.1


def test_a_checkpoint_before_the_last_is_gone_on_with_elsewhere(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path
) -> None:
    """Were it in the same folder, the next ``latest`` would be of the run that was given up."""
    train(config, material("epsilon"))
    folder = Path(config.output_dir)
    back = replace(config, resume=str(folder / "checkpoint-2"))
    with pytest.raises(ConfigError, match="later than checkpoint-2, up to checkpoint-6: delete"):
        train(back, material("epsilon"))
    train(replace(back, output_dir=str(tmp_path / "elsewhere")), material("epsilon"))
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    train(back, material("epsilon"))
    assert len(list_checkpoints(folder)) == 3


def test_what_is_refused_leaves_the_settings_as_they_are(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    file = Path(config.output_dir) / "config.json"
    before = file.read_text()
    wrong = replace(config, resume="latest", negative_share=0.5)
    with pytest.raises(ConfigError, match=r"its negative_share is 0\.0, 0\.5 is asked for"):
        train(wrong, material("epsilon"))
    assert file.read_text() == before
    train(replace(config, resume="latest", max_train_steps=8), material("epsilon"))
    assert DistillConfig.load(file) == replace(config, max_train_steps=8)  # and not to resume


def test_another_pool_is_no_spoilt_checkpoint(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    with pytest.raises(ConfigError, match="its pool has 8 latents, this run's has 16; resume"):
        train(replace(config, resume="latest", pool=16), material("epsilon"))


def test_a_validation_that_fails_loses_nothing(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, checkpointing_steps=6, validation_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(GuidanceValidation, "run", failing := Mock(side_effect=MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            train(config, material("epsilon"))
    failing.assert_called_once()
    assert [p.name for p in list_checkpoints(Path(config.output_dir))] == ["checkpoint-3"]
    train(replace(config, resume="latest"), material("epsilon"))


def test_a_folder_in_use_is_refused(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    with pytest.raises(ConfigError, match="holds the checkpoints of an earlier run"):
        train(config, material("epsilon"))


def test_a_checkpoint_of_another_guide_is_refused(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    torch.manual_seed(0)
    stuff = material("epsilon")
    other = TinyGuide.for_denoiser(stuff.pipe.unet, "epsilon", rank=5, condition=4)
    again = replace(config, resume="latest")
    with pytest.raises(
        ConfigError, match="cannot be gone on with so: its rank is 4, 5 is asked for"
    ):
        GuidanceDistillation(again, stuff, other).run()


def test_a_checkpoint_without_streams_is_refused(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    for stream in list_checkpoints(Path(config.output_dir))[-1].glob("stream-*"):
        stream.unlink()
    with pytest.raises(CheckpointError, match="holds no streams"):
        train(replace(config, resume="latest"), material("epsilon"))


def test_another_base_is_refused_on_resume(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    other = material("epsilon")
    other.pipe.unet.conv_in.bias.data.add_(1.0)
    with pytest.raises(ValueError, match="another base"):
        train(replace(config, resume="latest"), other)


def test_sigterm_saves_and_stops(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    whole = train(config, material("epsilon"))
    real, calls = guidance_stage.relative_guidance_loss, []

    def asked(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    cut = replace(config, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(guidance_stage, "relative_guidance_loss", asked)
        with pytest.raises(Interrupted, match="stopped at step 3"):
            train(cut, material("epsilon"))
    assert same(whole, train(replace(cut, resume="latest"), material("epsilon")))


def test_sigterm_may_come_twice_and_ctrl_c_need_not(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A manager and a launcher each send their own; a person who insists wants to leave."""
    real = guidance_stage.relative_guidance_loss

    def asked(*numbers: signal.Signals) -> Callable[..., torch.Tensor]:
        def loss(*args: Any) -> torch.Tensor:
            for number in numbers:
                signal.raise_signal(number)
            return real(*args)

        return loss

    for name, numbers, ended in (
        ("told", (signal.SIGTERM, signal.SIGTERM), Interrupted),
        ("both", (signal.SIGTERM, signal.SIGINT), Interrupted),
        ("left", (signal.SIGINT, signal.SIGINT), KeyboardInterrupt),
    ):
        monkeypatch.setattr(guidance_stage, "relative_guidance_loss", asked(*numbers))
        with pytest.raises(ended):
            train(replace(config, output_dir=str(tmp_path / name)), material("epsilon"))
        assert len(list_checkpoints(tmp_path / name)) == (ended is Interrupted)


@pytest.mark.slow
def test_kill_9_then_resume_gives_the_same_guide(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    material("epsilon").pipe.save_pretrained(base)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = replace(
        config, pretrained_model_name_or_path=str(base), prompts=str(tmp_path / "prompts.txt"),
        max_train_steps=40, checkpointing_steps=5, validation_steps=40,
    )  # fmt: skip

    def start(folder: str, *more: str) -> subprocess.Popen[bytes]:
        path = tmp_path / f"{folder}.json"
        replace(config, output_dir=str(tmp_path / folder)).save(path)
        command = [sys.executable, "-m", "pilotfish", "distill", "--config", str(path), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    whole = start("whole")
    assert whole.communicate()[0] is None
    assert whole.returncode == 0
    killed = start("killed")
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert list_checkpoints(tmp_path / "killed")
    assert not (tmp_path / "killed" / "guide").exists()
    assert start("killed", "--resume", "latest").wait() == 0
    weights = "guide/diffusion_pytorch_model.safetensors"
    one, two = ((tmp_path / f / weights).read_bytes() for f in ("whole", "killed"))
    assert one == two
