"""``pilotfish push``: a guide and its card to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pilotfish.guides import Guide
from pilotfish.guides.hub import published, upload


@dataclass(frozen=True)
class PushConfig:
    """Put a guide's folder on the hub: configuration, weights, card, and what the card links to.
    ``pilotfish card`` writes the card; ``hf auth login`` says who you are."""

    repo_id: tyro.conf.Positional[str]
    """Where to, owner/name; it is made where there is none."""
    guide: str
    """The guide's folder."""
    commit_message: str | None = None
    private: bool = False
    """Make the repository private, where it is made."""
    create_pr: bool = False
    """Open a pull request in place of a commit."""
    dry_run: bool = False
    """Check, and list what would go up; touch no network."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(PushConfig, args=list(arguments), prog="pilotfish push", use_underscores=True)
    folder = Path(config.guide)
    if not folder.is_dir():
        raise ValueError(f"--guide {folder} is no folder")
    Guide.from_pretrained(folder)  # what cannot be read is not published
    if config.dry_run:
        for name in published(folder):
            print(f"{name}  {(folder / name).stat().st_size:,} bytes")
        return
    address = upload(
        folder, config.repo_id, commit_message=config.commit_message,
        private=config.private or None, create_pr=config.create_pr,
    )  # fmt: skip
    print(f"pushed to {address}")
