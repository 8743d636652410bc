"""``pilotfish distill``: stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from pilotfish.cli.settings import parse
from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import distill


def main(arguments: Sequence[str]) -> None:
    """The command."""
    with suppress(ModuleNotFoundError):
        import_module("baselines")  # registers its guide types
    distill(parse(arguments, DistillConfig, "distill", "Train a guide against a frozen base. "))
