"""Settings for a base and the memory of a card, in TOML files beside this one.

What each needs is counted by ``benchmarks/presets.py``.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from pilotfish.training.config import ConfigError, DistillConfig, TrainingConfig

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """All presets: ``<base>-<card>gb``, by base and card."""
    found = [path.stem for path in FOLDER.glob("*.toml")]
    return sorted(found, key=lambda name: (name.rpartition("-")[0], card(name)))


def card(name: str) -> int:
    """The memory of the card in GB, as it is sold."""
    return int(name.rpartition("-")[2].removesuffix("gb"))


def settings(name: str, kind: type[TrainingConfig]) -> dict[str, Any]:
    """The settings of a preset by their names, those that a stage has.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in names():
        raise ConfigError(f"preset must be one of {', '.join(names())}, not {name}")
    known = {f.name for f in fields(kind)} - ({"guide"} if kind is not DistillConfig else set())
    found = DistillConfig.read(FOLDER / f"{name}.toml")
    return {key: value for key, value in found.items() if key in known}


def listed() -> str:
    """A line for each preset: its name and what it is for."""
    lines = [(FOLDER / f"{name}.toml").read_text(encoding="utf-8") for name in names()]
    firsts = [text.partition("\n")[0].removeprefix("#").strip() for text in lines]
    return "\n".join(f"{name:<16} {first}" for name, first in zip(names(), firsts, strict=True))
