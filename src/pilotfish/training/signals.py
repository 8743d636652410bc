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
        # a person who asks twice does not want to wait for the step to end; SIGTERM comes twice
        # by itself where a launcher hands on what its manager sends to all
        impatient = number == signal.SIGINT and number in asked
        asked.append(number)
        if impatient:
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
