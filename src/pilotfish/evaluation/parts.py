"""What an interrupted measurement leaves behind, so that it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import nn

from pilotfish.evaluation.result import Cost, HostResult
from pilotfish.evaluation.saved import ResultError, Saved
from pilotfish.evaluation.spread import is_main, on_main
from pilotfish.teacher import checksum

T = TypeVar("T")


class Unfinished(Saved):
    """What is finished, by the fingerprint of all that went into it.

    With another guide, model or setting a fingerprint is unknown, and that part is measured
    again: nothing stale can get into a result. Of several processes the first reads and writes.
    """

    @classmethod
    def found(cls, file: str | Path | None) -> Self:
        """Those of a file; none if there is no such file or it cannot be read."""
        return on_main(partial(cls._read, file))

    @classmethod
    def _read(cls, file: str | Path | None) -> Self:
        try:
            return cls.load(file) if file is not None else cls()
        except ResultError:
            return cls()

    def save(self, path: str | Path) -> None:
        if is_main():
            super().save(path)

    def measured(
        self, kept: dict[str, T], key: str, measure: Callable[[], T], file: str | Path | None
    ) -> T:
        """What is kept under a key; measured, and saved at once where there is a file, if it is
        not. ``kept`` is one of the mappings of this object."""
        if key not in kept:
            kept[key] = measure()
            if file is not None:
                self.save(file)
        return kept[key]


@dataclass
class Parts(Unfinished):
    """Of an evaluation."""

    hosts: dict[str, HostResult] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)


def modules(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by name."""
    return {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def fingerprint(networks: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> str:
    """SHA-256 of weights and settings; the latter by their ``repr``, so plain values only. Those
    of the first process: on another machine some would differ."""

    def hashed() -> str:
        digest = sha256()
        for name, module in sorted(networks.items()):
            digest.update(f"{name} {checksum(module)}\n".encode())
        digest.update(repr(sorted(settings.items())).encode())
        return digest.hexdigest()

    return on_main(hashed)
