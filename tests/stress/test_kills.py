"""A training that is killed at random moments and resumed by the same command."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import bundled
from pilotfish.training.checkpoint import PREFIX, list_checkpoints, load_checkpoint
from pilotfish.training.config import DistillConfig
from tests import forked
from tests.stress.page import LONG

MOMENTS = ("starting", "training", "writing")
"""While libraries and the last checkpoint are loaded; some time after a new checkpoint; while a
checkpoint is written."""
PATIENCE = 600.0
"""Seconds after which a training counts as hung."""
WEIGHTS = "guide/diffusion_pytorch_model.safetensors"


class Training:
    """A training in a process of its own."""

    def __init__(self, config: DistillConfig) -> None:
        self.folder = Path(config.output)
        self.settings = self.folder.with_suffix(".json")
        replace(config, resume_from_checkpoint="latest").save(self.settings)
        self.log = self.folder.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes] | forked.Forked:
        """The command; the same begins the training and resumes it."""
        arguments = ("distill", "--config", str(self.settings))
        if not LONG:
            return forked.Forked(*arguments, log=self.log)
        command = [sys.executable, "-m", "pilotfish", *arguments]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ.copy())

    def finish(self) -> None:
        """Start it and wait for its end."""
        code = self.start().wait(PATIENCE)
        assert code == 0, self.log.read_text(errors="replace")[-300:]

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        found = list_checkpoints(self.folder)
        return int(found[-1].name.removeprefix(PREFIX)) if found else 0

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is half written."""
        return next(self.folder.glob(f".{PREFIX}*.part"), None) is not None

    def kill(self, moment: str, fraction: float, loading: float) -> None:
        """Start it and kill it with signal 9.

        Args:
            fraction: how far into the moment, in [0, 1).
            loading: seconds that loading takes.
        """
        half = self.writing  # by an earlier kill
        process = self.start()
        deadline = time.monotonic() + PATIENCE

        def wait(done: Callable[[], bool]) -> None:
            while not done():
                assert process.poll() is None, "the training ended before it was to be killed"
                assert time.monotonic() < deadline, "the training hangs"
                time.sleep(0.0005)

        def wait_for_checkpoint(seconds: float = PATIENCE) -> None:
            before, end = self.step, time.monotonic() + seconds
            wait(lambda: self.step > before or time.monotonic() >= end)

        def wait_for(seconds: float) -> None:
            end = time.monotonic() + seconds
            wait(lambda: time.monotonic() >= end)

        try:
            if moment == "starting":
                wait_for_checkpoint(fraction * loading)
            elif moment == "training":
                checkpoints, rest = divmod(3 * fraction, 1)
                for _ in range(1 + int(checkpoints)):
                    wait_for_checkpoint()
                wait_for(0.2 * rest)
            else:
                if half or fraction < 0.5:
                    wait_for_checkpoint()
                wait(lambda: self.writing)
                wait_for(0.02 * (2 * fraction % 1))
        finally:
            process.kill()
            process.wait()


@forked.NEEDED
@pytest.mark.slow
def test_kills_change_nothing(
    make_pipe: Callable[[str], Any], tmp_path: Path,
    record: Callable[[str, dict[str, float]], None],
) -> None:  # fmt: skip
    kills, random_numbers = 20 if LONG else 3, random.Random(0)
    prompts = bundled.prompts("training")[:16] if LONG else ["a cat", "cat", "dog", "red cat"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    steps, every = (120, 3) if LONG else (60, 5)
    config = DistillConfig(
        output=str(tmp_path / "whole"), prompts=str(tmp_path / "prompts.txt"),
        validation_prompts=str(tmp_path / "prompts.txt"), train_batch_size=4, pool=8,
        replay_capacity=8, trajectory_steps_min=2, trajectory_steps_max=4, max_train_steps=steps,
        checkpointing_steps=every, validation_steps=steps, lr_warmup_steps=1, report_to="none",
    )  # fmt: skip
    if not LONG:
        make_pipe("epsilon").save_pretrained(tmp_path / "base")
        config = replace(config, pretrained_model_name_or_path=str(tmp_path / "base"))
    whole, killed = (
        Training(replace(config, output=str(tmp_path / name))) for name in ("whole", "killed")
    )
    whole.finish()
    start = time.monotonic()
    killed.kill("training", 0.0, 0.0)
    loading, moments, half_written = time.monotonic() - start, Counter({"training": 1}), 0
    for i in range(1, kills):
        moment, reached = MOMENTS[i % len(MOMENTS)], killed.step
        killed.kill(moment, random_numbers.random(), loading)
        assert killed.step >= reached, f"checkpoint {reached} was lost by a kill while {moment}"
        moments[moment] += 1
        half_written += moment == "writing" and killed.writing
    reached = killed.step
    assert 0 < reached < steps
    killed.finish()
    one, other = ((t.folder / WEIGHTS).read_bytes() for t in (whole, killed))
    assert one == other, "the killed training ended in other weights"
    ends = [load_checkpoint(list_checkpoints(t.folder)[-1]).tensors for t in (whole, killed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    record("kills", {
        "kills": kills, **{f"while {m}": moments[m] for m in MOMENTS},
        "checkpoints left half written": half_written, "training steps": steps,
        "step at the last kill": reached, "bytes of the guide": len(one), "bytes that differ": 0,
    })  # fmt: skip
