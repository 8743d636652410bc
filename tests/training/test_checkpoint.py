"""Checkpoints that survive a kill, a full disk and Windows."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pilotfish import checksums
from pilotfish.training.checkpoint import (
    CheckpointError,
    atomic_folder,
    list_checkpoints,
    load_checkpoint,
    optimizer_state,
    prune_checkpoints,
    restore_optimizer,
    write_state,
)

TENSORS = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b.c": torch.tensor(7)}
FACTS = {"seed": 3, "history": [{"loss": 0.5}]}


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]
) -> Path:
    final = folder / f"checkpoint-{step}"
    with atomic_folder(final) as aside:
        write_state(aside, step, tensors, facts)
    return final


def steps(folder: Path) -> list[int]:
    return [load_checkpoint(path).step for path in list_checkpoints(folder)]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    odd = {
        "turned": torch.randn(3, 4).T,
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "part": torch.randn(10)[2:5],
        "graph": torch.randn(3, requires_grad=True),
    }
    path = save_checkpoint(tmp_path / "new" / "run", 12, TENSORS | odd, FACTS)
    assert path.name == "checkpoint-12"
    assert {p.name for p in path.iterdir()} == {"state.json", "state.safetensors"}
    assert json.loads((path / "state.json").read_text()) == {"step": 12, **FACTS}
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.facts["seed"]) == (12, 3)
    for name, value in (TENSORS | odd).items():
        assert torch.equal(loaded.tensors[name], value)
        assert loaded.tensors[name].dtype == value.dtype
    assert set(loaded.part("model")) == {"a", "b.c"}
    assert set(loaded.part("model.b")) == {"c"}
    assert loaded.part("mod") == {}


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [9, 20, 100]), (2, [20, 100]), (9, [9, 20, 100])]
)
def test_they_are_listed_by_number_and_the_oldest_pruned(
    tmp_path: Path, limit: int | None, kept: list[int]
) -> None:
    for step in (100, 9, 20):
        save_checkpoint(tmp_path, step, TENSORS, {})
    (tmp_path / "checkpoint-x").mkdir()
    prune_checkpoints(tmp_path, limit)
    assert steps(tmp_path) == kept
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, TENSORS, {"seed": 0})
    save_checkpoint(tmp_path, 5, {"other": torch.ones(2)}, {"seed": 1})
    loaded = load_checkpoint(tmp_path / "checkpoint-5")
    assert set(loaded.tensors) == {"other"}
    assert loaded.facts["seed"] == 1


def half_written(error: BaseException) -> Any:
    def save(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize("step", [1, 2])
def test_a_full_disk_leaves_earlier_ones_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checksums, "save_file", half_written(full))
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        save_checkpoint(tmp_path, step, {}, FACTS)
    assert "--resume_from_checkpoint latest" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert set(load_checkpoint(tmp_path / "checkpoint-1").tensors) == set(TENSORS)


def test_checkpoints_are_written_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There ``os.open`` refuses folders, and ``os.fsync`` files that are open for reading."""
    plain, synced = os.open, []

    def windows_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, flags, *args, **kwargs)

    def windows_fsync(handle: int) -> None:
        os.write(handle, b"")  # refused where it is open for reading only
        synced.append(handle)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    assert steps(tmp_path) == [1]
    assert len(synced) == 2


def test_a_kill_in_the_middle_is_never_taken_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    with monkeypatch.context() as patch:
        patch.setattr(checksums, "save_file", half_written(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, TENSORS, FACTS)
    assert steps(tmp_path) == [1]
    save_checkpoint(tmp_path, 2, TENSORS, FACTS)
    assert steps(tmp_path) == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _without_checksum(path: Path) -> None:
    save_file(load_file(path), path)


SPOILT: dict[str, Any] = {
    "no JSON": lambda p: (p / "state.json").write_text('{"step": '),
    "no step": lambda p: (p / "state.json").write_text("{}"),
    "no object": lambda p: (p / "state.json").write_text("[1, 2]"),
    "another step": lambda p: (p / "state.json").write_text(json.dumps({"step": 2, **FACTS})),
    "truncated": lambda p: _truncate(p / "state.safetensors"),
    "empty": lambda p: (p / "state.safetensors").write_bytes(b""),
    "missing": lambda p: (p / "state.safetensors").unlink(),
    "without checksum": lambda p: _without_checksum(p / "state.safetensors"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, how: str) -> None:
    path = save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    SPOILT[how](path)
    with pytest.raises(CheckpointError, match="to resume from the one before") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_a_resumed_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            model(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = fresh()
    train(model, optimizer, range(3))
    tensors = {f"optimizer.{k}": v.clone() for k, v in optimizer_state(optimizer).items()}
    tensors |= {f"model.{k}": v for k, v in model.state_dict().items()}
    saved = save_checkpoint(tmp_path, 3, tensors, {})
    train(model, optimizer, range(3, 6))

    again, optimizer = fresh()
    loaded = load_checkpoint(saved)
    again.load_state_dict(loaded.part("model"))
    restore_optimizer(optimizer, loaded.part("optimizer"))
    train(again, optimizer, range(3, 6))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
