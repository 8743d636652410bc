"""``pilotfish distill``: stage 1."""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.cli.settings import parse
from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import distill


def main(arguments: Sequence[str]) -> None:
    """The command."""
    distill(parse(arguments, DistillConfig, "distill", "Train a guide against a frozen base. "))
