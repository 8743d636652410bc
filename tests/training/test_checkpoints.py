"""Checkpoints that survive a kill and a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import checksums
from pilotfish.training.checkpoints import (
    CheckpointError,
    list_checkpoints,
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    prune_checkpoints,
    restore_optimizer,
    save_checkpoint,
)

TENSORS = {"model.a": torch.arange(6.0).reshape(2, 3), "model.b.c": torch.tensor(7)}
FACTS = {"seed": 3, "history": [{"loss": 0.5}]}


def steps(folder: Path) -> list[int]:
    return [load_checkpoint(path).step for path in list_checkpoints(folder)]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "new" / "run", 12, TENSORS, FACTS)
    assert path.name == "checkpoint-12"
    loaded = load_checkpoint(path)
    assert loaded.step == 12
    assert loaded.facts["seed"] == 3
    assert loaded.facts["history"] == [{"loss": 0.5}]
    assert set(loaded.tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        assert torch.equal(loaded.tensors[name], value)
        assert loaded.tensors[name].dtype == value.dtype
    assert set(loaded.part("model")) == {"a", "b.c"}
    assert set(loaded.part("model.b")) == {"c"}
    assert loaded.part("mod") == {}


def test_any_layout_of_memory_is_saved(tmp_path: Path) -> None:
    odd = {
        "turned": torch.randn(3, 4).T,
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "part": torch.randn(10)[2:5],
        "graph": torch.randn(3, requires_grad=True),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, odd, {})).tensors
    assert all(torch.equal(loaded[k], v) for k, v in odd.items())


def test_they_are_listed_by_number(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        save_checkpoint(tmp_path, step, TENSORS, {})
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "guide").mkdir()
    assert steps(tmp_path) == [9, 20, 100]
    assert list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, [1, 2, 3]), (2, [2, 3]), (0, [3]), (9, [1, 2, 3])]
)
def test_the_oldest_are_pruned(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, TENSORS, {})
    prune_checkpoints(tmp_path, limit)
    assert steps(tmp_path) == kept


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


def test_a_full_disk_leaves_earlier_ones_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checksums, "save_file", half_written(full))
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, 2, TENSORS, FACTS)
    sentence = str(caught.value)
    assert "No space left on device" in sentence
    assert "--resume latest" in sentence
    assert len(sentence.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert steps(tmp_path) == [1]


def test_a_full_disk_while_a_step_is_saved_again_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checksums, "save_file", half_written(full))
    with pytest.raises(CheckpointError):
        save_checkpoint(tmp_path, 1, {}, {})
    assert set(load_checkpoint(tmp_path / "checkpoint-1").tensors) == set(TENSORS)


def test_checkpoints_are_written_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There ``os.open`` refuses folders, and ``os.fsync`` files that are open for reading."""
    plain, read_only = os.open, []

    def windows_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = plain(path, flags, *args, **kwargs)
        if not flags & (os.O_RDWR | os.O_WRONLY):
            read_only.append(handle)
        return handle

    def windows_fsync(handle: int) -> None:
        if handle in read_only:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    assert steps(tmp_path) == [1]


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


def spoil_json(path: Path) -> None:
    (path / "state.json").write_text('{"step": ')


def no_step(path: Path) -> None:
    (path / "state.json").write_text("{}")


def no_object(path: Path) -> None:
    (path / "state.json").write_text("[1, 2]")


def truncate(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def empty(path: Path) -> None:
    (path / "state.safetensors").write_bytes(b"")


def remove(path: Path) -> None:
    (path / "state.safetensors").unlink()


@pytest.mark.parametrize("spoil", [spoil_json, no_step, no_object, truncate, empty, remove])
def test_a_spoilt_checkpoint_is_refused(tmp_path: Path, spoil: Any) -> None:
    path = save_checkpoint(tmp_path, 1, TENSORS, FACTS)
    spoil(path)
    with pytest.raises(CheckpointError, match="delete it to resume from the one before") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


def test_facts_are_plain_json(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 4, TENSORS, FACTS)
    assert json.loads((path / "state.json").read_text()) == {"step": 4, **FACTS}
    assert {p.name for p in path.iterdir()} == {"state.json", "state.safetensors"}


def test_a_resumed_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
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
    train(model, optimizer, range(6))
    once = {k: v.clone() for k, v in model.state_dict().items()}

    model, optimizer = fresh()
    train(model, optimizer, range(3))
    tensors = {f"optimizer.{k}": v for k, v in optimizer_tensors(optimizer).items()}
    tensors |= dict(module_tensors({"model": model}))
    loaded = load_checkpoint(save_checkpoint(tmp_path, 3, tensors, {}))

    model, optimizer = fresh()
    model.load_state_dict(loaded.part("model"))
    restore_optimizer(optimizer, loaded.part("optimizer"))
    train(model, optimizer, range(3, 6))
    assert all(torch.equal(v, once[k]) for k, v in model.state_dict().items())
