"""Checkpoints: written under a temporary name, synced, then renamed.

A checkpoint is a folder ``checkpoint-<step>``: ``state.safetensors`` has the tensors of the
training state, ``stream-<i>.safetensors`` those of a stream of samples, and ``state.json`` the
plain numbers. SHA-256 checksums detect damage. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from pilotfish.checksums import METADATA_KEY, load_with_checksum, save_with_checksum
from pilotfish.training.config import ConfigError, differences
from pilotfish.training.samples import Streams, Tensors, below

if TYPE_CHECKING:
    from pilotfish.training.history import Progress
    from pilotfish.training.state import TrainState

PREFIX, STREAM = "checkpoint-", "stream-"
ADDED_SETTINGS: dict[str, Any] = {
    "base_quantization": "no", "resolutions": [], "negative_stream": "joint",
    "normalize_text": False, "image_tokens": 256,
}  # fmt: skip
"""What held for checkpoints from before there were these settings."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One saved training state.

    Attributes:
        step: optimizer steps done.
        tensors: by dotted names.
        facts: plain JSON values.
    """

    step: int
    tensors: Tensors
    facts: dict[str, Any]

    def part(self, prefix: str) -> Tensors:
        """The tensors below ``prefix.``, without that prefix."""
        return below(prefix, self.tensors)


class CheckpointManager:
    """Saves and resumes one run, whichever of its processes have which streams.

    Args:
        folder: of the run.
        state: with the progress, the content of a checkpoint beside the streams.
        base_sha256: of the base's weights.
        begun_sha256: of the trained guide that the run began with; None for a new one.
        settings: that a resumed run must share, in plain JSON.
        limit: checkpoints to keep; None keeps all.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, state: TrainState, progress: Progress, *,
        base_sha256: str, begun_sha256: str | None, settings: dict[str, Any], limit: int | None,
    ) -> None:  # fmt: skip
        self.folder, self.accelerator = folder, accelerator
        self.state, self.progress = state, progress
        self.base_sha256, self.begun_sha256 = base_sha256, begun_sha256
        self.settings, self.limit = settings, limit

    def save(self, streams: Streams) -> None:
        """Write a checkpoint. Every process writes its own streams."""
        main, step = self.accelerator.is_main_process, self.progress.step
        final = self.folder / f"{PREFIX}{step}"
        with atomic_folder(final, main, self.accelerator.wait_for_everyone) as folder:
            for number, tensors in streams.tensors().items():
                save_with_checksum(tensors, folder / f"{STREAM}{number}.safetensors", number)
            state = self.state.tensors()  # collective under FSDP
            if main:
                facts = self.state.facts() | self.progress.facts()
                facts |= {
                    "base_sha256": self.base_sha256, "begun_sha256": self.begun_sha256,
                    "settings": self.settings,
                }  # fmt: skip
                write_state(folder, step, state, facts)
        if main:
            prune_checkpoints(self.folder, self.limit)

    def stream_count(self, configured: int | None, checkpoint: Path | None) -> int:
        """Streams of the run: as configured, or as in the checkpoint, or one per process."""
        processes = self.accelerator.num_processes
        saved = len(saved_streams(checkpoint)) if checkpoint is not None else 0
        return configured or (saved if saved and saved % processes == 0 else processes)

    def load(self, path: Path, streams: Streams) -> None:
        """Resume from a checkpoint.

        Raises:
            CheckpointError: it cannot be read.
            ConfigError: its base, its settings or the guide that it began with are others.
        """
        checkpoint = load_checkpoint(path)
        found = ADDED_SETTINGS | checkpoint.facts.get("settings", {})
        dtype = {k: v for k, v in self.settings.items() if k == "base_dtype"}
        differs = differences(found, dtype, "checkpoint")  # it changes the SHA-256 as well
        if not differs and checkpoint.facts.get("base_sha256") != self.base_sha256:
            raise ConfigError(f"{path} was trained on another base; its SHA-256 differs")
        if differs := differs or differences(found, self.settings, "checkpoint"):
            raise ConfigError(f"Cannot continue training {path}: {differs}.")
        if checkpoint.facts.get("begun_sha256") != self.begun_sha256:
            raise ConfigError(f"{path} began with another guide; its SHA-256 differs")
        saved = saved_streams(path)
        if not saved:
            raise CheckpointError(f"{path} holds no stream-*.safetensors; delete it to resume from "
                                  "the one before")  # fmt: skip
        with readable(path):
            self.progress.load(checkpoint.step, checkpoint.facts)
            self.state.load(checkpoint)
            for number in streams.rings:  # new streams start as copies of saved ones
                name = saved[number % len(saved)]
                streams.load(number, _read(path / f"{STREAM}{name}.safetensors", name))


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """The checkpoint from which a run in a folder resumes; None: it starts from the beginning.

    Args:
        resume: ``latest`` or a checkpoint's folder; None: not at all.

    Raises:
        ConfigError: the run would not resume, but the folder holds checkpoints of an earlier one;
            or it holds later ones than the named one, which the next
            ``--resume_from_checkpoint latest`` would take.
        CheckpointError: the named one does not exist.
    """
    kept = list_checkpoints(folder)
    if resume is None:
        if kept:
            raise ConfigError(
                f"{folder} holds the checkpoints of an earlier run; "
                "--resume_from_checkpoint latest continues it, another --output keeps it"
            )
        return None
    if resume == "latest":
        return kept[-1] if kept else None
    if not Path(resume).is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {resume}: there is no such folder")
    if Path(resume).resolve() in [p.resolve() for p in kept[:-1]]:
        raise ConfigError(
            f"{folder} holds checkpoints later than {Path(resume).name}, up to {kept[-1].name}: "
            "delete those, or give another --output"
        )
    return Path(resume)


@contextmanager
def atomic_folder(
    final: Path, main: bool = True, wait: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A folder under a temporary name that is synced and renamed to ``final`` when the block ends.

    Args:
        main: whether this process creates and renames it.
        wait: waits for all processes that write into it.

    Raises:
        CheckpointError: the disk refused (full, read-only). Earlier files are intact.
    """
    folder = final.with_name(f".{final.name}.part")
    try:
        if main:
            final.parent.mkdir(parents=True, exist_ok=True)
            for left in (folder, *final.parent.glob(f".{PREFIX}*.old")):  # by a killed run
                shutil.rmtree(left, ignore_errors=True)
            folder.mkdir()
        wait()
        yield folder
        wait()
        if main:
            for path in (*(p for p in folder.rglob("*") if p.is_file()), folder):
                _sync(path)
            if final.exists():
                _remove(final)
            folder.rename(final)
            _sync(final.parent)
        wait()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"could not write {final}: {error}. Earlier checkpoints are intact; free some space "
            "and run the same command with --resume_from_checkpoint latest"
        ) from error


def write_state(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
) -> None:
    """Write ``state.safetensors`` and ``state.json`` into the folder of a checkpoint."""
    text = json.dumps({"step": step, **facts})
    save_with_checksum(tensors, folder / "state.safetensors", json.loads(text))
    (folder / "state.json").write_text(text, encoding="utf-8")


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, without its streams.

    Raises:
        CheckpointError: it is missing, damaged or no checkpoint.
    """
    with readable(path):
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        tensors = _read(path / "state.safetensors", facts)
        return Checkpoint(int(facts["step"]), tensors, facts)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=lambda p: int(p.name[len(PREFIX) :]))


def prune_checkpoints(folder: Path, limit: int | None) -> None:
    """Keep the newest ``limit`` checkpoints; None keeps all."""
    if limit is not None:
        for old in list_checkpoints(folder)[: -max(limit, 1)]:
            with suppress(OSError):
                _remove(old)


def saved_streams(path: Path) -> list[int]:
    """The numbers of the streams in a checkpoint folder."""
    return sorted(int(p.stem[len(STREAM) :]) for p in path.glob(f"{STREAM}*.safetensors"))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn every error of reading a checkpoint into a CheckpointError, except a ConfigError."""
    try:
        yield
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # a damaged file can have any content
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({error}); "
            "delete it to resume from the one before"
        ) from error


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state per parameter as a flat mapping ``<index>.<name> -> value``."""
    flat: dict[str, Any] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            if isinstance(value, dict):  # bitsandbytes nests some
                flat |= {f"{index}.{name}.{k}": v for k, v in value.items()}
            else:
                flat[f"{index}.{name}"] = value
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Any]) -> None:
    """Restore the result of :func:`optimizer_state`; parameter groups are unchanged."""
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in flat.items():
        index, *path, slot = name.split(".")
        place = whole["state"].setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[slot] = value
    optimizer.load_state_dict(whole)


def _read(path: Path, config: Any) -> Tensors:
    with safe_open(str(path), "pt") as file:
        if METADATA_KEY not in (file.metadata() or {}):
            raise ValueError(f"{path.name} has no checksum")
    return load_with_checksum(path, config)


def _remove(folder: Path) -> None:
    """Remove a folder at once, so that a kill never leaves a part of it under its name."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir():
        with suppress(PermissionError):  # Windows opens no folder
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return
    with path.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
