"""``pilotfish distill``: stage 1."""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.cli.names import guide
from pilotfish.cli.settings import parse
from pilotfish.distill.config import DistillConfig
from pilotfish.distill.stages import distill


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = parse(arguments, DistillConfig, "distill", "Train a guide against a frozen base. ")
    distill(config, guide(config.begin_with) if config.begin_with else None)
