"""Settings of a training from flags and from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from pilotfish.training.config import ConfigError, TrainingConfig

C = TypeVar("C", bound=TrainingConfig)


def parse(arguments: Sequence[str], kind: type[C], command: str, purpose: str) -> C:
    """Flags, over the values of a file given by ``--config``, over the defaults.

    Raises:
        ConfigError: the file cannot be read, or a value is out of its range.
    """
    arguments, default = list(arguments), None
    named = [i for i, a in enumerate(arguments) if a.partition("=")[0] == "--config"]
    for place in reversed(named):
        _, joined, file = arguments.pop(place).partition("=")
        if not joined:
            if place == len(arguments):
                raise ConfigError("--config needs the path of a JSON file")
            file = arguments.pop(place)
        default = kind.load(Path(file))
    description = purpose + (
        "--config FILE reads settings from JSON (such as a run's own config.json); flags go "
        "over it."
    )
    config: C = tyro.cli(
        kind, args=arguments, default=default, prog=f"pilotfish {command}",
        description=description, use_underscores=True,
    )  # type: ignore[assignment]  # fmt: skip
    return config
