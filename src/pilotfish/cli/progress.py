"""Progress bars of long measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pilotfish.evaluation.images import Progress
from pilotfish.evaluation.processes import is_main


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A function ``(what, done, total)`` that moves the bar of ``what``, one bar below another.
    Of several processes the first shows them."""
    bars: dict[str, tqdm[Any]] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = tqdm(total=total, desc=what, disable=not is_main())
        bars[what].update(done - bars[what].n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()
