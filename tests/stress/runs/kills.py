"""``kill``: one training, killed at random moments and started again by the same command."""

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

import torch

from tests.stress.runs.result import EnduranceError, Figures, Progress, require
from pilotfish import bundled
from pilotfish.training.checkpoint import PREFIX, list_checkpoints, load_checkpoint
from pilotfish.training.config import DistillConfig

MOMENTS = ("starting", "training", "writing")
"""While libraries and the last checkpoint are loaded; some time after a new checkpoint; while
one is being written, the first or the second."""
CHECKPOINTS = 3
"""The most that it may write before it is killed while training."""
TRAINING, WRITING = 0.2, 0.02
"""Seconds from the end of the last of them, and from the beginning of one, within which it is
killed."""
PATIENCE = 600.0
"""Seconds after which a training counts as hung."""


def short_training(folder: Path) -> DistillConfig:
    """A training on the embedded model, with few prompts, so that it is soon under way, and a
    checkpoint every third step."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{kind}.txt" for kind in ("training", "held_out")}
    for kind, number in (("training", 16), ("held_out", 2)):
        files[kind].write_text("\n".join(bundled.prompts(kind)[:number]))
    return DistillConfig(
        output=str(folder), prompts=str(files["training"]),
        validation_prompts=str(files["held_out"]), train_batch_size=8, max_train_steps=120,
        pool=64, replay_capacity=256, replay_reuse=2, checkpointing_steps=3, validation_steps=120,
        lr_warmup_steps=10, report_to="none", resume="latest",
    )  # fmt: skip


class Training:
    """A training in a process of its own, and what can be seen of it from outside.

    Args:
        config: its settings; it resumes from the latest checkpoint, so that the same command
            begins it and goes on with it.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.folder = Path(config.output)
        self.settings = self.folder.with_suffix(".json")
        self.settings.parent.mkdir(parents=True, exist_ok=True)
        replace(config, resume="latest").save(self.settings)
        self.log = self.folder.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes]:
        """The command."""
        command = [sys.executable, "-m", "pilotfish", "distill", "--config", str(self.settings)]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ.copy())

    def finish(self) -> None:
        """Start it and wait for its end.

        Raises:
            EnduranceError: it failed.
        """
        code = self.start().wait(PATIENCE)
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        require(code == 0, f"the training ended with {code}: {' '.join(last)}")

    @property
    def finished(self) -> bool:
        """Whether its guide is there."""
        return (self.folder / "guide").exists()

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        found = list_checkpoints(self.folder)
        return int(found[-1].name.removeprefix(PREFIX)) if found else 0

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is half written."""
        return next(self.folder.glob(f".{PREFIX}*.part"), None) is not None

    def kill_while(self, moment: str, share: float, loading: float) -> None:
        """Start it, and kill it with signal 9 at a moment.

        Args:
            share: how far into the moment, in [0, 1).
            loading: seconds that loading takes.

        Raises:
            EnduranceError: it ended by itself before.
        """
        half = self.writing
        process = self.start()
        wait = _Wait(process)
        if moment == "starting":
            self._checkpoint(wait, share * loading)
        elif moment == "training":
            written, rest = divmod(CHECKPOINTS * share, 1)
            for _ in range(1 + int(written)):
                self._checkpoint(wait)
            wait.seconds(rest * TRAINING)
        else:
            if half or share < 0.5:  # what an earlier kill left half written is not this one's
                self._checkpoint(wait)
            wait.until(lambda: self.writing)
            wait.seconds(2 * share % 1 * WRITING)
        process.kill()
        process.wait()

    def _checkpoint(self, wait: _Wait, seconds: float = PATIENCE) -> None:
        """Wait for another checkpoint, but only so long."""
        before, end = self.step, time.monotonic() + seconds
        wait.until(lambda: self.step > before or time.monotonic() >= end)


class _Wait:
    """Waiting on a process that must still be there afterwards."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.deadline = process, time.monotonic() + PATIENCE

    def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._check()
            time.sleep(0.0005)

    def seconds(self, number: float) -> None:
        end = time.monotonic() + number
        self.until(lambda: time.monotonic() >= end)

    def _check(self) -> None:
        if (code := self.process.poll()) is not None:
            raise EnduranceError(f"the training ended with {code} before it was to be killed")
        if time.monotonic() > self.deadline:
            self.process.kill()
            raise EnduranceError(f"the training did nothing for {PATIENCE:.0f} seconds")


def many_kills(config: DistillConfig, *, kills: int, seed: int, progress: Progress) -> Figures:
    """Train once without interruption, and once with so many kills.

    Args:
        config: a training long enough for them; ``output`` is a folder for both runs.

    Raises:
        EnduranceError: a training did not go on, or ended in other weights.
    """
    folder = Path(config.output)
    whole = Training(replace(config, output=str(folder / "whole")))
    killed = Training(replace(config, output=str(folder / "killed")))
    if not whole.finished:
        whole.finish()
    require(killed.step == 0, f"{folder / 'killed'} holds an earlier run; delete it")
    start = time.monotonic()
    killed.kill_while("training", 0.0, 0.0)
    loading, moments = time.monotonic() - start, Counter({"training": 1})
    draw, half_written = random.Random(seed), 0
    for i in range(1, kills):
        progress("kills", i, kills)
        # of each in turn, so that few kills have met all of them
        moment, reached = MOMENTS[i % len(MOMENTS)], killed.step
        killed.kill_while(moment, draw.random(), loading)
        require(killed.step >= reached, f"checkpoint {reached} was lost by a kill while {moment}")
        moments[moment] += 1
        half_written += moment == "writing" and killed.writing
    reached = killed.step
    require(not killed.finished, f"the training was over before {kills} kills; make it longer")
    killed.finish()
    progress("kills", kills, kills)
    weights = "diffusion_pytorch_model.safetensors"
    one, other = ((t.folder / "guide" / weights).read_bytes() for t in (whole, killed))
    require(one == other, "the killed training ended in other weights")
    ends = [load_checkpoint(list_checkpoints(t.folder)[-1]).tensors for t in (whole, killed)]
    same = ends[0].keys() == ends[1].keys()
    same = same and all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    require(same, "the killed training ended in another state of the optimiser")
    return {
        "kills": kills, **{f"kills_{m}": moments[m] for m in MOMENTS},
        "half_written": half_written, "steps": config.max_train_steps,
        "checkpointing_steps": config.checkpointing_steps, "step_at_last_kill": reached,
        "bytes_compared": len(one), "bytes_that_differ": 0,
    }  # fmt: skip
