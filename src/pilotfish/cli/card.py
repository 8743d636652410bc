"""``pilotfish card``: a model card beside a guide."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from pilotfish.evaluation.card import eval_results, measured, portable
from pilotfish.evaluation.result import Result
from pilotfish.guides import Guide
from pilotfish.guides.card import model_card
from pilotfish.guides.hub import CARD, digests
from pilotfish.training.trained import trained, training_folder

RESULT, GRID = "result.json", "grid.png"
"""Under these names they come to lie beside the card."""


@dataclass(frozen=True)
class CardConfig:
    """Write README.md into a guide's folder, for the Hugging Face hub: the base, how to use the
    guide, what was measured, how it was trained, the weights' SHA-256. No path of this machine
    goes in."""

    guide: str
    """The guide's folder."""
    result: str | None = None
    """What ``pilotfish evaluate --output`` wrote of this guide; a copy goes beside the card."""
    grid: str | None = None
    """What ``pilotfish evaluate --grid`` drew; a copy goes beside the card."""
    base_model: str | None = None
    """Hub id of the base. Left out: the name that the guide remembers."""
    revision: str | None = None
    """The base's commit. Left out: the one that the guide remembers."""
    licence: str | None = None
    """The guide's, as the hub names it, such as apache-2.0."""
    repo_id: str | None = None
    """Hub id under which the guide will be found."""
    training: str | None = None
    """The folder of its training. Left out: the one that the guide's folder lies in."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(CardConfig, args=list(arguments), prog="pilotfish card", use_underscores=True)
    folder = Path(config.guide)
    if not folder.is_dir():
        raise ValueError(f"--guide {folder} is no folder; a card is written beside a guide")
    guide = Guide.from_pretrained(folder)
    result = portable(Result.load(config.result)) if config.result else None
    if result is not None and result.guide.parameters != guide.num_parameters():
        raise ValueError(
            f"{config.result} is of a guide with {result.guide.parameters:,} parameters, and this "
            f"one has {guide.num_parameters():,}"
        )
    training = Path(config.training) if config.training else training_folder(folder)
    card = model_card(
        guide, digests(folder), base_model=config.base_model, revision=config.revision,
        licence=config.licence, repo_id=config.repo_id, grid=GRID if config.grid else None,
        measured=measured(result, RESULT) if result else "",
        results=eval_results(result) if result else (),
        trained=trained(training) if training else "",
    )  # fmt: skip
    if config.grid and Path(config.grid).resolve() != (folder / GRID).resolve():
        shutil.copyfile(config.grid, folder / GRID)
    if result is not None:
        result.save(folder / RESULT)
    card.save(folder / CARD)
    print(f"saved {folder / CARD}")
