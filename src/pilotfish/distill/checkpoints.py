"""Checkpoints that survive a kill: written aside, synced, then renamed into place.

A checkpoint is a folder ``checkpoint-<step>`` with two files: ``state.safetensors``
holds every tensor (weights, averages, optimiser moments, sampling state) and
``state.json`` every plain number. Nothing is pickled, so nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PREFIX = "checkpoint-"


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


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> Path:
    """Write ``folder/checkpoint-<step>`` so that it either exists whole or not at all.

    Raises:
        CheckpointError: the disk refused (full, read-only). What was saved before is untouched.
    """
    final = folder / f"{PREFIX}{step}"
    aside = folder / f".{PREFIX}{step}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(contiguous, str(aside / "state.safetensors"))
        (aside / "state.json").write_text(json.dumps({"step": step, **facts}))
        for path in (aside / "state.safetensors", aside / "state.json", aside):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"could not write {final}: {error}. Earlier checkpoints are intact; free some "
            "space and run the same command with --resume latest"
        ) from error
    return final


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
        shutil.rmtree(folder, ignore_errors=True)
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
    """Read one checkpoint folder.

    Raises:
        CheckpointError: it is missing, truncated or not a checkpoint.
    """
    try:
        facts = json.loads((path / "state.json").read_text())
        tensors = load_file(str(path / "state.safetensors"))
        return Checkpoint(int(facts["step"]), tensors, facts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({error}); "
            "delete it to resume from the one before"
        ) from error


def prune_checkpoints(folder: Path, limit: int | None) -> None:
    """Keep the newest ``limit`` checkpoints (all of them for ``None``)."""
    if limit is not None:
        for old in list_checkpoints(folder)[: -max(limit, 1)]:
            shutil.rmtree(old, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's per-parameter state as a flat mapping ``<index>.<name> -> tensor``."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": v for i, slots in state.items() for k, v in slots.items()}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave; the parameter groups stay as they are."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in tensors.items():
        index, _, slot = name.partition(".")
        whole["state"].setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict(whole)


def module_tensors(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """State dicts of several modules as one flat mapping ``<module>.<key>``."""
    for name, module in modules.items():
        for key, value in module.state_dict().items():
            yield f"{name}.{key}", value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
