"""On what a measurement ran: the processor and the versions, no name of a machine."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("pilotfish", "torch", "diffusers", "transformers", "torchmetrics")


def machine() -> str:
    """The processor's model and the threads in use, and the accelerator if there is one."""
    threads = torch.get_num_threads()
    words = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide the figures."""
    found = {"python": ".".join(str(n) for n in sys.version_info[:3])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"
