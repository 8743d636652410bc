"""One progress bar for long measurements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pilotfish.evaluation.scores import Progress as Report
from pilotfish.evaluation.spread import is_main


@contextmanager
def shown() -> Iterator[Report]:
    """A function ``(what, done, total)`` that moves a bar; each ``what`` is a line of its own. Of
    several processes the first shows it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, disable=not is_main()) as progress:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield report
