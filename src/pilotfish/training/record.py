"""What a training run has done so far, in numbers that a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEEP = 0.98
"""Share of the smoothed figures that a new step leaves as it was."""


class Record:
    """See the module.

    Args:
        measure: what the stage brings down from 1 to 0, a gap as a share of the whole.

    Attributes:
        step: optimiser steps done.
        seconds: spent on them, the teacher's passes among them.
        smooth: the loss and the measure, smoothed over some fifty micro-batches.
        history: a row for each validation.
    """

    def __init__(self, measure: str) -> None:
        self.measure, self.step, self.seconds = measure, 0, 0.0
        self.smooth: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def note(self, loss: float, gap: float, whole: float) -> None:
        """One micro-batch."""
        for name, new in (("loss", loss), ("gap", gap), ("whole", whole)):
            old = self.smooth.get(name, new)
            self.smooth[name] = KEEP * old + (1 - KEEP) * new
        self.smooth[self.measure] = self.smooth["gap"] / max(self.smooth["whole"], 1e-12)

    def line(self) -> str:
        """For a progress bar."""
        words, value = self.measure.replace("_", " "), self.smooth[self.measure]
        return f"loss {self.smooth['loss']:.4f}  {words} {value:.3f}"

    def validated(self, row: Mapping[str, float], folder: Path) -> None:
        """One validation; ``folder/history.json`` has them all."""
        self.history.append({"step": self.step, "loss": self.smooth["loss"], **row})
        (folder / "history.json").write_text(json.dumps(self.history, indent=1) + "\n")

    def finished(self, batch: int, folder: Path) -> None:
        """The run is done; ``folder/training.json`` says what it took."""
        took = {"steps": self.step, "samples": self.step * batch, "seconds": self.seconds}
        (folder / "training.json").write_text(json.dumps(took, indent=1) + "\n")

    def facts(self) -> dict[str, Any]:
        """What must be saved, beside the step."""
        return {"history": self.history, "smooth": self.smooth, "seconds": self.seconds}

    def load(self, step: int, facts: Mapping[str, Any]) -> None:
        """Put it back."""
        self.step, self.seconds = step, facts["seconds"]
        self.smooth, self.history = facts["smooth"], facts["history"]
