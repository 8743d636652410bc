"""How a guide was trained, from the files that its training has left: a command and figures."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from pilotfish.backbones import portable_path
from pilotfish.training.config import DistillConfig, StepsConfig, TrainingConfig

OF_THE_MACHINE = ("resume", "report_to", "checkpointing_steps", "checkpoints_total_limit")
"""Settings that make no difference to the guide."""


def training_folder(guide: Path) -> Path | None:
    """The folder in which a guide was trained, where it still lies in it."""
    folder = guide.resolve().parent
    return folder if (folder / "training.json").is_file() else None


def trained(folder: Path) -> str:
    """The command that repeats a training, in Markdown, and what it took if it is done; of a
    round of stage 2, with the rounds before it.

    Raises:
        ConfigError: ``config.json`` cannot be read.
    """
    config, folders = settings(folder), [folder]
    rounds = [f"steps-{n}" for n in getattr(config, "steps", ())]
    if folder.name in rounds and isinstance(config, StepsConfig):
        so_far = rounds.index(folder.name) + 1
        folders = [folder.with_name(name) for name in rounds[:so_far]]
        config = replace(config, output_dir=str(folder.parent), steps=config.steps[:so_far])
    text = f"```bash\n{command(config)}\n```"
    if all((place / "training.json").is_file() for place in folders):
        took = [json.loads((place / "training.json").read_text()) for place in folders]
        steps, samples, seconds = (
            sum(one[what] for one in took) for what in ("steps", "samples", "seconds")
        )
        text += f"\n\n{steps:,} steps, {samples:,} samples, {seconds / 60:,.0f} minutes."
    return text


def settings(folder: Path) -> TrainingConfig:
    """Those of a run of either stage.

    Raises:
        ConfigError: ``config.json`` cannot be read.
    """
    file = folder / "config.json"
    second = file.is_file() and '"steps":' in file.read_text()
    return StepsConfig.load(file) if second else DistillConfig.load(file)


def command(config: TrainingConfig) -> str:
    """The command line: what differs from the defaults, without the folders of this machine."""
    words = ["pilotfish", "distill-steps" if isinstance(config, StepsConfig) else "distill"]
    for field in fields(config):
        value, name = getattr(config, field.name), field.name
        if name in OF_THE_MACHINE or (field.default is not MISSING and value == field.default):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
            continue
        values: list[Any] = list(value) if isinstance(value, tuple) else [value]
        words += [f"--{name}", *(portable_path(str(v)) for v in values)]
    return shlex.join(words)
