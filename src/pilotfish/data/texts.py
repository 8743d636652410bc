"""Texts that stay on the disk and are read by their index."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import overload


class Texts(Sequence[str]):
    """Texts by index; a slice gives a list."""

    @abstractmethod
    def one(self, index: int) -> str:
        """That of an index in [0, N)."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        where = range(len(self))[index]
        return self.one(where) if isinstance(where, int) else [self.one(i) for i in where]


class Lines(Texts):
    """The non-empty lines of a UTF-8 text file, without their margins. Where each begins and
    ends is all that lies in memory.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read, or is no text.
    """

    def __init__(self, path: Path) -> None:
        self.starts, self.ends = array("Q"), array("Q")
        with path.open("rb") as file:
            end = 0
            for raw in file:
                for line in raw.decode("utf-8").splitlines(keepends=True):
                    start, end = end, end + len(line.encode("utf-8"))
                    if line.strip():
                        self.starts.append(start)
                        self.ends.append(end)
            self.file = mmap(file.fileno(), 0, access=ACCESS_READ) if self.starts else b""

    def __len__(self) -> int:
        return len(self.starts)

    def one(self, index: int) -> str:
        return self.file[self.starts[index] : self.ends[index]].decode("utf-8").strip()


class Joined(Texts):
    """Several, one after another."""

    def __init__(self, *parts: Sequence[str]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def one(self, index: int) -> str:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)
