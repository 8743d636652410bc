"""The progress of a run in numbers, and what its folder says of how the guide was trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

from pilotfish.backbones import portable_path
from pilotfish.data.text_files import write_text
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig, TrainingConfig

SMOOTHING = 0.98
"""Weight of the old value in the smoothed figures, which average some fifty micro-batches."""
OF_THE_MACHINE = (
    "resume_from_checkpoint", "report_to", "checkpointing_steps", "checkpoints_total_limit",
    "cache_embeddings", "offload_text_encoders",
)  # fmt: skip
"""Settings that do not change the guide."""


class Progress:
    """See the module.

    Args:
        measure: name of the stage's relative error, 1 for an untrained student.

    Attributes:
        step: optimizer steps done.
        seconds: taken by them, with the teacher's passes.
        smooth: the smoothed loss and relative error.
        history: a row for each validation.
    """

    def __init__(self, measure: str) -> None:
        self.measure, self.step, self.seconds = measure, 0, 0.0
        self.smooth: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def update(self, loss: float, error: float, untrained_error: float) -> None:
        """Add one micro-batch."""
        new = {"loss": loss, "error": error, "untrained_error": untrained_error}
        for name, value in new.items():
            old = self.smooth.get(name, value)
            self.smooth[name] = SMOOTHING * old + (1 - SMOOTHING) * value
        whole = max(self.smooth["untrained_error"], 1e-12)
        self.smooth[self.measure] = self.smooth["error"] / whole

    def line(self) -> str:
        """The text of the progress bar."""
        name, value = self.measure.replace("_", " "), self.smooth[self.measure]
        return f"loss {self.smooth['loss']:.4f}  {name} {value:.3f}"

    def add_validation(self, row: Mapping[str, float], folder: Path) -> None:
        """Add a validation and write all of them to ``folder/history.json``."""
        self.history.append({"step": self.step, "loss": self.smooth["loss"], **row})
        write_text(folder / "history.json", json.dumps(self.history, indent=1) + "\n")

    def finish(self, batch: int, folder: Path, begun_sha256: str | None) -> None:
        """Write the cost of the finished run to ``folder/training.json``, and the SHA-256 of the
        trained guide that it began with; null for a new guide."""
        cost = {"steps": self.step, "samples": self.step * batch, "seconds": self.seconds}
        facts = cost | {"begun_sha256": begun_sha256}
        write_text(folder / "training.json", json.dumps(facts, indent=1) + "\n")

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the step."""
        return {"history": self.history, "smooth": self.smooth, "seconds": self.seconds}

    def load(self, step: int, facts: Mapping[str, Any]) -> None:
        """Restore it."""
        self.step, self.seconds = step, facts["seconds"]
        self.smooth, self.history = facts["smooth"], facts["history"]


def begun_sha256(folder: Path) -> str | None:
    """The SHA-256 of the guide with which a finished run began; None where it is not known.

    Raises:
        ConfigError: ``training.json`` cannot be read.
    """
    return _cost(folder).get("begun_sha256") if (folder / "training.json").is_file() else None


def _cost(folder: Path) -> dict[str, Any]:
    """What :meth:`Progress.finish` wrote."""
    file = folder / "training.json"
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove it") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} does not hold what a training cost; remove it")
    return found


def training_folder(guide: Path) -> Path | None:
    """The folder in which a guide was trained, if the guide is still in it."""
    folder = guide.resolve().parent
    return folder if (folder / "training.json").is_file() else None


def describe_training(folder: Path) -> str:
    """The command that repeats a training, in Markdown, and its cost if it is finished; for a round
    of stage 2 with the rounds before it.

    Raises:
        ConfigError: ``config.json`` or ``training.json`` cannot be read.
    """
    config, folders = load_settings(folder), [folder]
    rounds = [f"steps-{n}" for n in getattr(config, "steps", ())]
    if folder.name in rounds and isinstance(config, StepsConfig):
        done = rounds.index(folder.name) + 1
        folders = [folder.with_name(name) for name in rounds[:done]]
        config = replace(config, output=str(folder.parent), steps=config.steps[:done])
    text = f"```bash\n{command_line(config)}\n```"
    if all((place / "training.json").is_file() for place in folders):
        costs = [_cost(place) for place in folders]
        steps, samples, seconds = (
            sum(one.get(what, 0) for one in costs) for what in ("steps", "samples", "seconds")
        )
        text += f"\n\n{steps:,} steps, {samples:,} samples, {seconds / 60:,.0f} minutes."
    return text


def load_settings(folder: Path) -> TrainingConfig:
    """The settings of a run of either stage.

    Raises:
        ConfigError: ``config.json`` cannot be read.
    """
    file = folder / "config.json"
    second = file.is_file() and '"steps":' in file.read_text(encoding="utf-8")
    return StepsConfig.load(file) if second else DistillConfig.load(file)


def command_line(config: TrainingConfig) -> str:
    """The command with the flags that differ from the defaults, without this machine's folders."""
    words = ["pilotfish", "distill-steps" if isinstance(config, StepsConfig) else "distill"]
    parts = [config, config.guide] if isinstance(config, DistillConfig) else [config]
    for part in parts:
        for field in fields(part):
            value, name = getattr(part, field.name), field.name
            default = field.default is not MISSING and value == field.default
            if name in OF_THE_MACHINE or default or value is parts[-1] is not config:
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no_{name}")
                continue
            values: list[Any] = list(value) if isinstance(value, tuple) else [value]
            words += [f"--{name}", *(portable_path(str(v)) for v in values)]
    return shlex.join(words)
