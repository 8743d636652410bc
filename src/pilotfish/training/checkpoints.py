"""Checkpoints that survive a kill: written aside, synced, then renamed into place.

A checkpoint is a folder ``checkpoint-<step>``: ``state.safetensors`` holds every tensor of the
learner (weights, averages, optimiser moments), ``stream-<i>.safetensors`` those of a stream of
training states, and ``state.json`` every plain number. Checksums detect a damaged one
(:mod:`pilotfish.checksums`). Nothing is pickled, so nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pilotfish.checksums import load_with_checksum, save_with_checksum
from pilotfish.training.config import ConfigError

PREFIX, STREAM = "checkpoint-", "stream-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved training state.

    Attributes:
        step: optimiser steps done when it was saved.
        tensors: flat ``name -> tensor`` mapping, names joined with dots.
        facts: plain JSON values (seed, configuration, history).
    """

    step: int
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below ``prefix.``, with that prefix taken off."""
        start = prefix + "."
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}


class Writing:
    """A checkpoint on its way to the disk. It exists whole or not at all.

    One process opens and closes it; in between, any process may write streams into it.

    Args:
        folder: where ``checkpoint-<step>`` will be.
        step: optimiser steps done.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self.final = folder / f"{PREFIX}{step}"
        self.aside = folder / f".{PREFIX}{step}.part"

    def open(self) -> None:
        """Make room beside the place where it will be."""
        with self._refusals():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (self.aside, *self.folder.glob(f".{PREFIX}*.old")):  # by a kill
                shutil.rmtree(left, ignore_errors=True)
            self.aside.mkdir()

    def stream(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write what must be saved of one stream of states."""
        with self._refusals():
            _write(self.aside / f"{STREAM}{number}.safetensors", tensors, number)

    def close(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Path:
        """Write the rest; from now on it exists."""
        with self._refusals():
            state, text = self.aside / "state.json", json.dumps({"step": self.step, **facts})
            _write(self.aside / "state.safetensors", tensors, json.loads(text))
            state.write_text(text)
            for path in (state, self.aside):
                _sync(path)
            if self.final.exists():
                _remove(self.final)
            self.aside.rename(self.final)
            _sync(self.folder)
        return self.final

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise CheckpointError(
                f"could not write {self.final}: {error}. Earlier checkpoints are intact; free "
                "some space and run the same command with --resume latest"
            ) from error


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> Path:
    """Write ``folder/checkpoint-<step>``, all of it by this process.

    Raises:
        CheckpointError: the disk refused (full, read-only). What was saved before is untouched.
    """
    writing = Writing(folder, step)
    writing.open()
    return writing.close(tensors, facts)


def save_whole(model: Any, folder: Path) -> None:
    """``model.save_pretrained(folder)``, so that the folder exists whole or not at all.

    Raises:
        CheckpointError: the disk refused. What was in the folder before is untouched.
    """
    aside = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if folder.exists():
            _remove(folder)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"could not write {folder}: {error}. Checkpoints are intact; free some space and run "
            "the same command with --resume latest"
        ) from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder, without its streams.

    Raises:
        CheckpointError: it is missing, damaged or not a checkpoint.
    """
    with readable(path):
        facts = json.loads((path / "state.json").read_text())
        tensors = load_with_checksum(path / "state.safetensors", facts)
        return Checkpoint(int(facts["step"]), tensors, facts)


def saved_streams(path: Path) -> list[int]:
    """The numbers of the streams in a checkpoint folder."""
    return sorted(int(p.stem[len(STREAM) :]) for p in path.glob(f"{STREAM}*.safetensors"))


def load_stream(path: Path, number: int) -> dict[str, torch.Tensor]:
    """Read one stream of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    with readable(path):
        return load_with_checksum(path / f"{STREAM}{number}.safetensors", number)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong with what is read of a checkpoint folder is a CheckpointError, but that
    it is of another run."""
    try:
        yield
    except (CheckpointError, ConfigError):  # that this run is another spoils nothing
        raise
    except Exception as error:  # a damaged file can have anything in it
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({error}); "
            "delete it to resume from the one before"
        ) from error


def prune_checkpoints(folder: Path, limit: int | None) -> None:
    """Keep the newest ``limit`` checkpoints (all of them for ``None``)."""
    if limit is not None:
        for old in list_checkpoints(folder)[: -max(limit, 1)]:
            with suppress(OSError):
                _remove(old)


MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps for a parameter in the parameter's own form."""


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's per-parameter state as a flat mapping ``<index>.<name> -> tensor``."""
    return {k: v for k, v in _slots(optimizer) if isinstance(v, torch.Tensor)}


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What of that state is plain numbers (bitsandbytes counts its steps so)."""
    return {k: v for k, v in _slots(optimizer) if not isinstance(v, torch.Tensor)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, slots: Mapping[str, torch.Tensor | float]
) -> None:
    """Put back what :func:`optimizer_tensors` and :func:`optimizer_numbers` gave; the parameter
    groups stay as they are.

    Raises:
        ValueError: they are not of this optimiser's parameters.
    """
    whole = optimizer.state_dict()
    whole["state"] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in slots.items():
        index, *way, slot = name.split(".")
        if isinstance(value, torch.Tensor) and slot in (*MOMENTS, "step"):
            like = torch.tensor(0.0) if slot == "step" else parameters[int(index)]
            check_forms({name: value}, {name: like}, "the optimiser")
        place = whole["state"].setdefault(int(index), {})
        for part in way:
            place = place.setdefault(part, {})
        place[slot] = value
    if len({frozenset(kept) for kept in whole["state"].values()}) > 1:
        raise ValueError("the optimiser lacks some of its tensors")
    optimizer.load_state_dict(whole)


def _slots(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, dict):  # bitsandbytes keeps some together
                yield from ((f"{index}.{name}.{k}", v) for k, v in value.items())
            else:
                yield f"{index}.{name}", value


def check_forms(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], what: str
) -> None:
    """Refuse tensors of other names, shapes or types.

    Raises:
        ValueError: naming the first that differs.
    """
    for name in sorted(expected.keys() | found.keys()):
        forms = [
            f"{value.dtype} {list(value.shape)}"
            if (value := side.get(name)) is not None
            else "none"
            for side in (found, expected)
        ]
        if forms[0] != forms[1]:
            raise ValueError(f"{what} has {forms[0]} for {name}, this run has {forms[1]}")


def module_tensors(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """State dicts of several modules as one flat mapping ``<module>.<key>``."""
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            yield f"{name}.{key}", value


def _write(path: Path, tensors: Mapping[str, torch.Tensor], beside: Any) -> None:
    save_with_checksum(tensors, path, beside)
    _sync(path)


def _remove(folder: Path) -> None:
    """Remove a folder at once, so that a kill never leaves a part of it under its name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    folder = path.is_dir()
    try:  # Windows flushes only files that are open for writing, and opens no folders
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
