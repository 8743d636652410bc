"""The process of ``pilotfish`` and ``python -m pilotfish``, alone or one of several."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from pilotfish.cli import main


def run() -> NoReturn:
    """Run the command of ``sys.argv``, then exit."""
    try:
        code = main()
    finally:
        is_distributed = _destroy_process_group()
    if is_distributed:
        # FSDP keeps threads of the process group alive; if one of them frees a tensor during the
        # interpreter's shutdown, torch aborts, and the launcher kills the process that saves the
        # guide
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _destroy_process_group() -> bool:
    """Destroy the process group; False if there is none."""
    distributed = sys.modules.get("torch.distributed")
    if not distributed or not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True


if __name__ == "__main__":
    run()
