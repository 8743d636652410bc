"""The command as a process: how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from pilotfish import __main__ as process

# A thread of the process group drops its last tensor when the interpreter is already going down;
# what FSDP has cached keeps that thread alive.
LATE = """
import sys, time
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from pilotfish import __main__ as process

def main():
    where = "file://" + sys.argv[1]
    distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    layer = torch.nn.Linear(4, 4)
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer.weight.full_tensor()
    work = distributed.all_reduce(torch.ones(3), async_op=True)
    work.get_future().then(lambda _: [time.sleep(0.001) for _ in range(3000)])
    print("done")
    return int(sys.argv[2])

process.main = main
process.run()
"""


def ended(program: str, *arguments: str) -> tuple[int, str]:
    """The exit code of a program, and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_process_among_several_ends_with_its_own_code(tmp_path: Path) -> None:
    assert ended(LATE, str(tmp_path / "store"), "3") == (3, "done\n")


def test_it_ends_at_once_and_the_group_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a late thread makes the one above fail is up to it."""

    class EndedError(Exception):
        pass

    def leave(code: int) -> None:
        raise EndedError(code)

    where = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    monkeypatch.setattr(process, "main", lambda: 5)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(EndedError, match="5"):
        process.run()
    assert not distributed.is_initialized()


def test_a_process_alone_ends_as_python_does() -> None:
    program = (
        "import atexit; from pilotfish import __main__ as process; "
        "process.main = lambda: 3; atexit.register(print, 'last'); process.run()"
    )
    assert ended(program) == (3, "last\n")
