"""SIGTERM and Ctrl-C, answered where nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and Ctrl-C into a question that is answered between two steps."""
    asked: list[int] = []

    def remember(number: int, frame: Any) -> None:
        asked.append(number)
        if len(asked) > 1:  # asked twice: do not wait for the step to end
            raise KeyboardInterrupt

    try:
        before = {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: signals belong to somebody else
        before = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
