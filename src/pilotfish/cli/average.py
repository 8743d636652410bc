"""``pilotfish average``: the mean of guides that were trained apart from one beginning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pilotfish.cli.names import open_guide
from pilotfish.guides.mean import mean_guide


@dataclass(frozen=True)
class AverageConfig:
    """What to average."""

    guides: tuple[str, ...]
    """Two guides or more of one kind and base: folders, hub ids or names of carried ones. Give
    each its training from the same beginning (``pilotfish distill --begin_with``), with another
    ``--seed`` or other fine-tunes to practise on."""
    output_dir: str
    """Where the mean is saved."""
    half: bool = False
    """Save it in half precision."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        AverageConfig, args=list(arguments), prog="pilotfish average", use_underscores=True
    )
    folder = Path(config.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; another --output_dir keeps what is there")
    made = mean_guide([open_guide(name) for name in config.guides])
    (made.half() if config.half else made).save_pretrained(folder)
    print(f"saved {folder}")
