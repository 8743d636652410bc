"""``pilotfish average``: the mean of guides that were trained from one initial guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pilotfish.bundled import open_guide
from pilotfish.guides.average import average_guides


@dataclass(frozen=True)
class AverageConfig:
    """Average the weights of guides."""

    guides: tuple[str, ...]
    """Two guides or more of one type and base: folders, hub ids or names of bundled ones. Train
    each from the same initial guide (``pilotfish distill --init_from``), with another ``--seed`` or
    other ``--train_finetunes``."""
    output: str
    """Folder for the mean."""
    half: bool = False
    """Save it in float16."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        AverageConfig, args=list(arguments), prog="pilotfish average", use_underscores=True
    )
    folder = Path(config.output)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give another --output")
    mean = average_guides([open_guide(name) for name in config.guides])
    (mean.half() if config.half else mean).save_pretrained(folder)
    print(f"saved {folder}")
