"""Two real processes train one guide: the same as one process with both streams would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pilotfish.guides import Guide, TinyGuide
from pilotfish.training.checkpoints import list_checkpoints, saved_streams
from pilotfish.training.config import DistillConfig, StepsConfig, TrainingConfig
from pilotfish.training.stages import distill, distill_steps

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]
WEIGHTS = "guide/diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(make_pipe: Callable[[str], Any], tmp_path: Path) -> DistillConfig:
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return DistillConfig(
        output_dir=str(tmp_path / "run"), pretrained_model_name_or_path=str(tmp_path / "base"),
        prompts=str(tmp_path / "prompts.txt"), train_batch_size=4, max_train_steps=12, pool=8,
        replay_capacity=8, trajectory_steps_min=2, trajectory_steps_max=4, checkpointing_steps=6,
        checkpoints_total_limit=None, validation_steps=12, lr_warmup_steps=1,
        negative_share=0.5, states="student", report_to="tensorboard",
    )  # fmt: skip


def on_two(config: TrainingConfig, command: str = "distill") -> Path:
    """The command on two processes."""
    folder = Path(config.output_dir)
    file = folder.with_suffix(".json")
    config.save(file)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "pilotfish", command, "--config", str(file)], capture_output=True, text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def on_one(config: DistillConfig) -> Path:
    """The same on this process."""
    distill(config)
    return Path(config.output_dir)


def close(one: Path, two: Path) -> bool:
    a, b = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    return all(torch.allclose(v, b[k], rtol=1e-3, atol=1e-5) for k, v in a.items())


@pytest.fixture
def rounds(config: DistillConfig, make_unet: Callable[..., Any], randomise: Any) -> StepsConfig:
    guide = randomise(TinyGuide.for_denoiser(make_unet(), "epsilon", rank=4, condition=4))
    folder = Path(config.output_dir).with_name("teacher")
    guide.save_pretrained(folder)
    given = {field.name: getattr(config, field.name) for field in fields(TrainingConfig)}
    return replace(StepsConfig(**given), steps=(4, 2), guide=str(folder), max_train_steps=4)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(config: DistillConfig, tmp_path: Path) -> None:
    def elsewhere(name: str, **changes: Any) -> DistillConfig:
        return replace(config, output_dir=str(tmp_path / name), **changes)

    two = on_two(elsewhere("two"))
    one = on_one(elsewhere("one", train_batch_size=8, streams=2))
    assert close(two, one)
    # other states, so the comparison can fail
    assert not close(two, on_one(elsewhere("other", train_batch_size=8)))
    # written once
    histories = [json.loads((folder / "history.json").read_text()) for folder in (one, two)]
    assert [row["step"] for row in histories[1]] == [12]
    assert histories[1][0]["guidance_error"] == pytest.approx(
        histories[0][0]["guidance_error"], rel=1e-3
    )
    assert json.loads((two / "training.json").read_text())["samples"] == 12 * 8
    assert len(list((two / "logs").rglob("events*"))) == 1
    middle = list_checkpoints(two)[0]
    assert saved_streams(middle) == [0, 1]
    # begun on two, ended on one
    assert close(one, on_one(elsewhere("again", train_batch_size=8, resume=str(middle))))
    # and the other way round
    first = list_checkpoints(one)[0]
    assert close(one, on_two(elsewhere("back", resume=str(first))))


@pytest.mark.slow
def test_two_processes_do_every_round_of_fewer_steps(rounds: StepsConfig, tmp_path: Path) -> None:
    two = on_two(rounds, "distill-steps")
    one = replace(rounds, output_dir=str(tmp_path / "one"), train_batch_size=8, streams=2)
    distill_steps(one, Guide.from_pretrained(rounds.guide))
    for name in ("steps-4", "steps-2"):
        assert close(two / name, tmp_path / "one" / name)
        assert len(list((two / name / "logs").rglob("events*"))) == 1
    assert not close(two / "steps-4", two / "steps-2")
