"""Many users of the app at once, each with prompts and seeds of their own; with ``STRESS=1``."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from PIL import Image

from pilotfish import bundled
from tests.stress.page import LONG

USERS, MINUTES, REQUESTS, STEPS = 8, 5.0, 24, 4
GROWTH = 64.0
"""MiB that the server may grow by after its first fifth."""
PATIENCE = 300.0
"""Seconds within which the page must be there."""


@contextmanager
def server(log: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The app in a process of its own: its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    command = [sys.executable, "-m", "pilotfish", "app", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + PATIENCE
        while not listens():
            assert process.poll() is None, log.read_text(errors="replace")[-300:]
            assert time.monotonic() < deadline, "the page did not open"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def drawn(client: Any, request: tuple[Any, ...]) -> list[bytes]:
    """The images of all galleries of an answer."""
    answer = client.predict(*request, api_name="/draw")
    files = [Path(item["image"]) for gallery in answer[:-1] for item in gallery]
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.tobytes())
        file.unlink()
    return images


@pytest.mark.skipif(not LONG, reason="takes minutes; STRESS=1 runs it")
@pytest.mark.enable_socket
def test_many_users_get_the_images_of_their_seeds(
    tmp_path: Path, record: Callable[[str, dict[str, float]], None]
) -> None:
    gradio_client = pytest.importorskip("gradio_client")

    def connect(url: str, name: str) -> Any:
        return gradio_client.Client(
            url, verbose=False, analytics_enabled=False, download_files=str(tmp_path / name)
        )

    numbers = random.Random(0)
    prompts, models, guide = bundled.prompts("held_out"), list(bundled.MODELS), "tiny"
    requests = [
        (models[i % len(models)], guide, numbers.choice(prompts), "",
         numbers.choice((2.0, 4.0, 7.5)), 0, STEPS, numbers.randrange(2**16))
        for i in range(REQUESTS)
    ]  # fmt: skip
    counts: Counter[str] = Counter()
    memory: list[tuple[float, float]] = []
    with server(tmp_path / "log") as (url, process):
        alone = connect(url, "alone")
        expected = [drawn(alone, request) for request in requests]
        start = time.monotonic()
        end = start + 60 * MINUTES

        def user(number: int) -> None:
            own, client = random.Random(number), connect(url, f"user-{number}")
            while time.monotonic() < end:
                i = own.randrange(REQUESTS)
                try:
                    images = drawn(client, requests[i])
                except Exception as error:  # whatever a user meets counts
                    counts[f"error: {error!r}"] += 1
                    continue
                counts["images"] += len(images)
                counts["wrong"] += sum(a != b for a, b in zip(images, expected[i], strict=True))

        with ThreadPoolExecutor(USERS) as pool:
            running = [pool.submit(user, number) for number in range(USERS)]
            while any(not one.done() for one in running):
                memory.append((time.monotonic() - start, process.memory_info().rss / 2**20))
                time.sleep(1)
            for one in running:
                one.result()
    early = median(mib for at, mib in memory if 6 * MINUTES < at <= 12 * MINUTES)
    growth = median(mib for at, mib in memory if at > 54 * MINUTES) - early
    assert counts.keys() <= {"images", "wrong"}, counts
    assert counts["wrong"] == 0
    assert counts["images"] >= 3 * USERS
    assert growth <= GROWTH
    record("app", {
        "users": USERS, "minutes": MINUTES, "images": counts["images"], "wrong images": 0,
        "errors": 0, "MiB of the server": early, "MiB of growth": growth,
    })  # fmt: skip
