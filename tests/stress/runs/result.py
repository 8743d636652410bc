"""What was found, part by part, and the file that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pilotfish.evaluation.results import machine, versions
from pilotfish.evaluation.results import Saved

Figures = dict[str, float]
# (what, done, total): moves a progress bar
Progress = Callable[[str, int, int], None]


class EnduranceError(RuntimeError):
    """The library did not hold; the message says where."""


@dataclass(frozen=True)
class Part:
    """One line of trials.

    Attributes:
        figures: what was counted and measured, by name.
        command: the command line that repeats it.
        machine: on which it ran.
    """

    figures: Figures
    command: str
    machine: str
    versions: dict[str, str]
    seed: int


@dataclass(frozen=True)
class HoldingUp(Saved):
    """All of it, by the name of the part."""

    parts: dict[str, Part] = field(default_factory=dict)

    @classmethod
    def found(cls, path: Path) -> HoldingUp:
        """That of a file, or nothing yet.

        Raises:
            ResultError: the file holds something else.
        """
        return cls.load(path) if path.exists() else cls()

    def has(self, name: str, command: str) -> bool:
        """Whether a part is there, of the same command."""
        return name in self.parts and self.parts[name].command == command

    def with_part(self, name: str, figures: Figures, command: str, seed: int) -> HoldingUp:
        """The same with one part anew."""
        part = Part(figures, command, machine(), versions(), seed)
        return HoldingUp(self.parts | {name: part})


def require(holds: bool, what: str) -> None:
    """Stop where the library did not hold.

    Raises:
        EnduranceError: ``what`` happened.
    """
    if not holds:
        raise EnduranceError(what)
