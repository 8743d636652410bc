"""``pilotfish`` as a process of its own, or as one of several; so is ``python -m pilotfish``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from pilotfish.cli import main


def run() -> NoReturn:
    """Run the command that the process was started with, and end the process."""
    try:
        code = main()
    finally:
        among_several = _part()
    if among_several:
        # FSDP's caches keep the threads of a process group beyond its end; one that still has a
        # tensor to drop while the interpreter goes down makes torch abort, and the launcher then
        # stops the process that is saving the guide
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _part() -> bool:
    """Several processes let go of one another; whether this was one of them."""
    distributed = sys.modules.get("torch.distributed")
    if not distributed or not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True


if __name__ == "__main__":
    run()
