"""``screenshots``: the app as a browser shows it, for docs/app.md."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from pilotfish.app import page as app
from pilotfish.app.drawing import Studio

VIEWPORT = {"width": 1280, "height": 700}
SCALE = 1.25
"""Pixels of a screenshot for one of the page."""
COLOURS = 256
"""Enough for a page, dithered; half the size of the file."""
DRAWINGS = 5
"""Whatever else the machine does makes a drawing slower; the quickest of so many is shown."""
SECONDS = 120_000


class NoBrowserError(RuntimeError):
    """There is no Chromium on this machine."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's own Chromium, without a window; none is ever downloaded.

    Raises:
        NoBrowserError: there is none.
    """
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        raise NoBrowserError("no chromium on this machine; Debian has it: apt-get install chromium")
    # without a sandbox, which root is not given; only the app's own page is opened
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser,
    ):
        yield browser


def take_screenshots(folder: Path) -> None:
    """``app.png``, the page as it opens, and ``app-strip.png``, with a strip drawn."""
    page = app.build(Studio.embedded())
    url = app.serve(page, wait=False)
    try:
        with chromium() as browser:
            shown = browser.new_page(viewport=VIEWPORT, device_scale_factor=SCALE)
            shown.set_default_timeout(SECONDS)
            shown.goto(url)
            shown.locator("#gallery img").last.wait_for()
            _quickest(shown, "#draw", folder / "app.png")
            shown.get_by_role("tab", name="By guidance scale").click()
            _quickest(shown, "#draw-strip", folder / "app-strip.png")
    finally:
        page.close(verbose=False)


def _quickest(page: Page, button: str, path: Path) -> None:
    """Press a button that draws again and again, and keep the page as it was after the quickest
    drawing, all ways together."""
    least = math.inf
    for _ in range(DRAWINGS):
        figures = page.locator(".figures >> visible=true")
        before = figures.all_inner_texts()
        page.locator(button).click()
        while not (shown := figures.all_inner_texts()) or shown == before:
            page.wait_for_timeout(200)
        seconds = sum(float(text.split()[-2]) for text in shown)
        if seconds < least:
            least = seconds
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)  # until nothing moves
            image = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
            palette = image.quantize(COLOURS, method=Image.Quantize.FASTOCTREE)
            image.quantize(palette=palette).save(path, optimize=True)  # dithered
    print(f"saved {path}")
