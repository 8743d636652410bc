"""``app``: several users at once on the page, each with prompts and seeds of their own."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from tests.stress.runs.memory import resident
from tests.stress.runs.result import Figures, Progress, require
from pilotfish import bundled

STEPS = 4
WISHES = 24
"""Different things to ask for; each is drawn once before, with nobody else there."""
GROWTH = 64.0
"""MiB that the server may grow by after its first fifth: much less than a picture's worth for
each."""
PATIENCE = 300.0
"""Seconds within which the page must be there."""


@dataclass
class Seen:
    """What the users met.

    Attributes:
        resident: MiB of the server, at times as seconds from the beginning.
    """

    pictures: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    resident: list[tuple[float, float]] = field(default_factory=list)


@contextmanager
def _page(log: Path) -> Iterator[tuple[str, int]]:
    """The app in a process of its own: its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "pilotfish", "app", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _listens(port):
            there = process.poll() is None and time.monotonic() < deadline
            require(there, f"the page did not open: {log.read_text(errors='replace')[-300:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


def _client(url: str, folder: Path) -> Any:
    from gradio_client import Client  # comes with gradio, an extra

    return Client(url, verbose=False, analytics_enabled=False, download_files=str(folder))


def _drawn(client: Any, wish: tuple[Any, ...]) -> list[tuple[str, bytes]]:
    """The page's pictures: four without guidance, by CFG and guided."""
    *galleries, _ = client.predict(*wish, api_name="/draw")
    pictures = []
    for file in (Path(item["image"]) for gallery in galleries for item in gallery):
        with Image.open(file) as image:
            pictures.append((f"{image.mode} {image.size}", image.tobytes()))
        file.unlink()
    return pictures


def many_users(*, users: int, minutes: float, seed: int, progress: Progress) -> Figures:
    """Let so many users draw at once for so long.

    Raises:
        EnduranceError: a picture that is not that of its seed, an error, memory that grew.
    """
    draw = random.Random(seed)
    prompts, hosts = bundled.prompts("held_out"), list(bundled.MODELS)
    guide = bundled.guide_names()[0]
    wishes = [
        (hosts[i % len(hosts)], guide, draw.choice(prompts), "", draw.choice((2.0, 4.0, 7.5)), STEPS,
         draw.randrange(2**16))
        for i in range(WISHES)
    ]  # fmt: skip
    seen = Seen()
    with TemporaryDirectory() as place, _page(Path(place) / "log") as (url, process):
        alone = _client(url, Path(place) / "alone")
        expected = []
        for i, wish in enumerate(wishes):
            expected.append(_drawn(alone, wish))
            progress("alone", i + 1, WISHES)
        different = {picture for pictures in expected for _, picture in pictures}
        require(len(different) == 12 * WISHES, "two wishes have the same picture")
        begin = time.monotonic()
        end = begin + 60 * minutes

        def user(number: int) -> None:
            own = random.Random(seed * users + number)
            client = _client(url, Path(place) / f"user-{number}")
            while time.monotonic() < end:
                i = own.randrange(WISHES)
                try:
                    made = _drawn(client, wishes[i])
                except Exception as error:  # whatever a user meets counts
                    seen.errors.append(f"{error!r}")
                    continue
                seen.pictures += len(made)
                seen.wrong += sum(a != b for a, b in zip(made, expected[i], strict=True))

        with ThreadPoolExecutor(users) as crowd:
            working = [crowd.submit(user, number) for number in range(users)]
            while any(not one.done() for one in working):
                now = time.monotonic() - begin
                seen.resident.append((now, resident(process)))
                progress("seconds", min(int(now), int(60 * minutes)), int(60 * minutes))
                time.sleep(1)
            for one in working:
                one.result()
    early = [mib for at, mib in seen.resident if 6 * minutes < at <= 12 * minutes]
    late = [mib for at, mib in seen.resident if at > 54 * minutes]
    growth = median(late) - median(early)
    require(not seen.errors, f"{len(seen.errors)} errors, the first {seen.errors[:1]}")
    require(
        seen.wrong == 0, f"{seen.wrong} of {seen.pictures} pictures are not those of their seed"
    )
    require(seen.pictures >= 3 * users, f"only {seen.pictures} pictures were drawn")
    require(growth <= GROWTH, f"the server grew by {growth:.1f} MiB")
    return {
        "users": users, "minutes": minutes, "pictures": seen.pictures, "wrong": seen.wrong,
        "errors": len(seen.errors), "resident_mib": median(early), "growth_mib": growth,
    }  # fmt: skip
