"""An interrupted run loses nothing, and continues only as the run that it was."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from pilotfish.guides import Guide
from pilotfish.training import stages
from pilotfish.training.checkpoint import CheckpointError, list_checkpoints
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.trainer import Interrupted
from pilotfish.training.validation import GuidanceValidation
from tests import forked
from tests.training.runs import PROMPTS, WEIGHTS, same, train

Context = Callable[..., TrainingContext]


@pytest.mark.parametrize(
    ("source", "accumulation"), [("noised", 1), ("trajectory", 2), ("on_policy", 1)]
)
def test_resumed_equals_uninterrupted(
    config: DistillConfig, context: Context, source: Any, accumulation: int, tmp_path: Path
) -> None:
    config = replace(config, training_samples=source, gradient_accumulation_steps=accumulation)
    whole = train(config, context())
    path = str(Path(config.output) / "checkpoint-2")
    again = replace(config, output=str(tmp_path / "again"), resume_from_checkpoint=path)
    assert same(whole, train(again, context()))


def test_a_lower_rate_on_resume_counts(
    config: DistillConfig, context: Context, tmp_path: Path
) -> None:
    """A resumed run takes the learning rate and the decay of its own configuration."""
    config = replace(config, learning_rate=1e-2, lr_scheduler="constant", lr_warmup_steps=0)
    whole = train(config, context())
    path = str(Path(config.output) / "checkpoint-2")

    def resumed(name: str, **changes: Any) -> tuple[Guide, dict[str, Any]]:
        folder = tmp_path / name
        guide = train(
            replace(config, output=str(folder), resume_from_checkpoint=path, **changes), context()
        )
        return guide, json.loads((folder / "checkpoint-4" / "state.json").read_text())

    slower, facts = resumed("slower", learning_rate=1e-3)
    assert not same(whole, slower)
    assert facts["lr_scheduler"]["base_lrs"] == facts["lr_scheduler"]["_last_lr"] == [1e-3]
    other, facts = resumed("other", ema_decay=0.1)
    assert not same(whole, other)
    assert facts["ema"]["decay"] == 0.1


def test_another_run_is_refused_and_changes_nothing(
    config: DistillConfig, context: Context
) -> None:
    train(config, context())
    folder = Path(config.output)
    file = folder / "config.json"
    before, latest = file.read_text(), replace(config, resume_from_checkpoint="latest")
    with pytest.raises(ConfigError, match="holds the checkpoints of an earlier run"):
        train(config, context())
    for changes, words in (
        ({"negative_prompt_prob": 0.5}, r"negative_prompt_prob is 0\.0 in the checkpoint, 0\.5"),
        ({"guide": {"rank": 5}}, r"Cannot continue training .*: rank is 4 in the checkpoint, 5"),
        (
            {"base_dtype": "bf16"},
            "base_dtype is fp32 in the checkpoint, bf16 in the configuration",
        ),
        ({"pool": 16}, "the pool has 8 latents in the checkpoint, 16 in the configuration"),
        (
            {"resume_from_checkpoint": str(folder / "checkpoint-2")},
            "later than checkpoint-2, up to checkpoint-4",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            train(replace(latest, **changes), context())
    other = context()
    other.pipe.unet.conv_in.bias.data.add_(1.0)
    with pytest.raises(ConfigError, match="another base; its SHA-256 differs"):
        train(latest, other)
    other = context()
    other.prompts = [*PROMPTS[1:], PROMPTS[0]]
    words = r": prompts is 6 texts with the SHA-256 \w+ in the checkpoint, 6 texts with the SHA-256"
    with pytest.raises(ConfigError, match=words):
        train(latest, other)
    assert file.read_text() == before
    train(replace(latest, max_train_steps=6), context())
    assert DistillConfig.load(file) == replace(config, max_train_steps=6)  # without resume
    for stream in list_checkpoints(folder)[-1].glob("stream-*"):
        stream.unlink()
    with pytest.raises(CheckpointError, match=r"holds no stream-\*"):
        train(latest, context())
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    train(replace(config, resume_from_checkpoint=str(folder / "checkpoint-2")), context())
    assert len(list_checkpoints(folder)) == 2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({}, ConfigError, "holds the checkpoints of an earlier run"),
        (
            {"resume_from_checkpoint": "{run}/checkpoint-2"}, ConfigError,
            "later than checkpoint-2, up to",
        ),
        (
            {"resume_from_checkpoint": "{run}/checkpoint-9"}, CheckpointError,
            "there is no such folder",
        ),
        ({"output": "{run}/new", "prompts": "{run}/gone.txt"}, ValueError, "gone.txt"),
        (
            {"output": "{run}/new", "training_samples": "noised", "train_images": "{run}"},
            ValueError, "has no metadata.jsonl",
        ),
    ],
)  # fmt: skip
def test_it_is_refused_before_the_base_is_loaded(
    config: DistillConfig, settings: dict[str, str], error: type[Exception], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for step in (2, 4):
        (Path(config.output) / f"checkpoint-{step}").mkdir(parents=True)
    for place in ("bundled.load_model", "load_pipeline"):
        monkeypatch.setattr(f"pilotfish.training.context.{place}", pytest.fail)
    given = {name: value.format(run=config.output) for name, value in settings.items()}
    with pytest.raises(error, match=words):
        stages.distill(replace(config, **given))


def test_a_validation_that_fails_loses_nothing(
    config: DistillConfig, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, checkpointing_steps=6, validation_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(GuidanceValidation, "run", failing := Mock(side_effect=MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            train(config, context())
    failing.assert_called_once()
    assert [p.name for p in list_checkpoints(Path(config.output))] == ["checkpoint-3"]
    train(replace(config, resume_from_checkpoint="latest"), context())


@pytest.mark.parametrize(
    ("signals", "ended"),
    [
        ((signal.SIGTERM,), Interrupted),
        ((signal.SIGTERM, signal.SIGTERM), Interrupted),  # a manager's and the launcher's
        ((signal.SIGTERM, signal.SIGINT), Interrupted),
        ((signal.SIGINT, signal.SIGINT), KeyboardInterrupt),
    ],
)
def test_signals_save_and_stop(
    config: DistillConfig, context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    signals: Any, ended: Any,
) -> None:  # fmt: skip
    real, calls = stages.guidance_loss, []

    def interrupted(*args: Any) -> torch.Tensor:
        calls.append(1)
        for number in signals if len(calls) == 3 else ():
            signal.raise_signal(number)
        return real(*args)

    stopped = replace(config, output=str(tmp_path / "stopped"), checkpointing_steps=10)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "guidance_loss", interrupted)
        with pytest.raises(ended):
            train(stopped, context())
    assert len(list_checkpoints(tmp_path / "stopped")) == (ended is Interrupted)
    if signals == (signal.SIGTERM,):
        resumed = train(replace(stopped, resume_from_checkpoint="latest"), context())
        assert same(train(config, context()), resumed)


@forked.NEEDED
@pytest.mark.slow
def test_kill_9_then_resume_gives_the_same_guide(saved_base: DistillConfig, tmp_path: Path) -> None:
    config = replace(saved_base, max_train_steps=40, checkpointing_steps=5, validation_steps=40)

    def start(folder: str, *more: str) -> forked.Forked:
        path = tmp_path / f"{folder}.json"
        replace(config, output=str(tmp_path / folder)).save(path)
        log = tmp_path / f"{folder}.log"
        return forked.Forked("distill", "--config", str(path), *more, log=log)

    assert start("whole").wait() == 0
    killed = start("killed")
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert list_checkpoints(tmp_path / "killed")
    assert not (tmp_path / "killed" / "guide").exists()
    assert start("killed", "--resume_from_checkpoint", "latest").wait() == 0
    one, two = ((tmp_path / f / WEIGHTS).read_bytes() for f in ("whole", "killed"))
    assert one == two
