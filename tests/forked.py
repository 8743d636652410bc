"""Processes of ``pilotfish``, forked from one that has imported its libraries.

Each is a process of its own, with an exit code, a log and an end by signal 9, but it starts in a
tenth of a second. A fresh interpreter takes some seconds of imports, and ``torch.distributed.run``
thrice as many; both are tested in one place, ``tests/test_process.py`` and
``tests/training/test_processes.py``.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

NEEDED = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
"""For tests of such processes."""
IMPORTED = (
    "accelerate", "tensorboard", "torch.distributed.fsdp", "diffusers.pipelines.stable_diffusion",
    "transformers.models.clip.modeling_clip", "pilotfish.cli.distill",
    "pilotfish.cli.distill_steps", "pilotfish.cli.evaluate", "tests.forked",
)  # fmt: skip
"""By the process that the others are forked from."""


class Forked:
    """A running command, with the methods of ``subprocess.Popen`` that tests use.

    Args:
        arguments: of the command line.
        log: the file that its output is added to.
        script: to run in place of ``pilotfish``.
        folder: to run it in.
        processes: how many do it together, as ``torch.distributed.run`` starts them; 1 is alone.
    """

    def __init__(
        self, *arguments: str, log: Path, script: Path | None = None, folder: Path | None = None,
        processes: int = 1,
    ) -> None:  # fmt: skip
        context = get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED])
        given = (arguments, log, script, folder or Path.cwd(), processes)
        self._process = context.Process(target=_start, args=given, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """With signal 9."""
        self._process.kill()

    def wait(self, timeout: float = 600.0) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutExpired: it runs on after so many seconds.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired("pilotfish", timeout)
        return code


def _start(
    arguments: tuple[str, ...], log: Path, script: Path | None, folder: Path, processes: int
) -> None:
    """In the forked process."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.argv = ["pilotfish", *arguments]
    if processes > 1:
        _run_together(script, processes)
    else:
        _run(script)


def _run(script: Path | None) -> None:
    if script is not None:
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module("pilotfish", run_name="__main__")


def _run_together(script: Path | None, processes: int) -> None:
    """Fork the processes and wait for all of them; where one fails, end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = set()
    for rank in range(processes):
        child = os.fork()
        if not child:
            _run_as(rank, processes, port, script)
        running.add(child)
    failed = False
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    sys.exit(int(failed))


def _run_as(rank: int, processes: int, port: int, script: Path | None) -> None:
    """Run as one of them, then exit."""
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        torch.set_num_threads(1)
        _run(script)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
