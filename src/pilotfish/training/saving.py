"""Saving and resuming a run, whichever of its processes hold which streams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pilotfish.training.checkpoints import (
    CheckpointError,
    Writing,
    list_checkpoints,
    load_checkpoint,
    load_stream,
    prune_checkpoints,
    readable,
    saved_streams,
)
from pilotfish.training.config import ConfigError, differing
from pilotfish.training.learner import Learner
from pilotfish.training.record import Record
from pilotfish.training.streams import Streams


class Saving:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        learner: with the record, what a checkpoint keeps beside the streams.
        base_checksum: of the base's weights.
        what: what is trained, in plain JSON.
        limit: how many are kept; None keeps all.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, learner: Learner, record: Record, *,
        base_checksum: str, what: dict[str, Any], limit: int | None,
    ) -> None:  # fmt: skip
        self.folder, self.accelerator = folder, accelerator
        self.learner, self.record = learner, record
        self.base_checksum, self.what, self.limit = base_checksum, what, limit

    def save(self, streams: Streams) -> None:
        """Write a checkpoint: weights, average, optimiser, states, history."""
        accelerator = self.accelerator
        writing = Writing(self.folder, self.record.step)
        if accelerator.is_main_process:
            writing.open()
        accelerator.wait_for_everyone()
        for number, states in streams.tensors().items():
            writing.stream(number, states)
        tensors = self.learner.tensors()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            facts = self.learner.facts() | self.record.facts()
            facts |= {"base_checksum": self.base_checksum, "what": self.what}
            writing.close(tensors, facts)
            prune_checkpoints(self.folder, self.limit)
        accelerator.wait_for_everyone()

    def found(self, resume: str | None, notice: Callable[[str], None]) -> Path | None:
        """The checkpoint to go on from.

        Raises:
            ConfigError: the folder holds later ones than the one that is named: the next
                ``--resume latest`` would go on from those.
        """
        if resume != "latest":
            named = None if resume is None else Path(resume)
            kept = list_checkpoints(self.folder)
            if named and named.resolve() in [p.resolve() for p in kept[:-1]]:
                raise ConfigError(
                    f"{self.folder} holds checkpoints later than {named.name}, up to "
                    f"{kept[-1].name}: delete those, or give another --output_dir"
                )
            return named
        if found := list_checkpoints(self.folder):
            return found[-1]
        notice(f"no checkpoint in {self.folder}; starting from the beginning")
        return None

    def number_of_streams(self, asked: int | None, found: Path | None) -> int:
        """As many in all as were asked for, or as a checkpoint has, or one a process."""
        processes = self.accelerator.num_processes
        saved = len(saved_streams(found)) if found is not None else 0
        return asked or (saved if saved and saved % processes == 0 else processes)

    def load(self, path: Path, streams: Streams) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointError: it cannot be read.
            ConfigError: it is of another base, or something else was trained.
        """
        checkpoint = load_checkpoint(path)
        if checkpoint.facts.get("base_checksum") != self.base_checksum:
            raise ConfigError(f"{path} was trained on another base; its checksum differs")
        if differs := differing(self.what, checkpoint.facts.get("what", {})):
            raise ConfigError(f"{path} cannot be gone on with so: {differs}")
        saved = saved_streams(path)
        if not saved:
            raise CheckpointError(f"{path} holds no streams of states; an older version made it")
        with readable(path):
            self.record.load(checkpoint.step, checkpoint.facts)
            self.learner.load(checkpoint)
            for number in streams.rings:  # where there are more now, several go on from one
                streams.load(number, load_stream(path, saved[number % len(saved)]))
