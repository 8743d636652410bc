"""Stage ``screenshots``: the app as a browser shows it, for docs/app.md."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, ViewportSize, sync_playwright

from pilotfish import bundled
from pilotfish.app import page as app
from pilotfish.app.session import IMAGES, Session

VIEWPORT: ViewportSize = {"width": 1280, "height": 700}
SCALE = 1.25
"""Pixels of a screenshot for one of the page."""
COLOURS = 256
"""Enough for a page, dithered; half the size of the file."""
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
    """``app.png``, the page with its first prompt drawn."""
    guides = {name: bundled.load_guide(name) for name in bundled.guide_names()}
    page = app.build(Session({name: bundled.load_model(name) for name in bundled.STYLES}, guides))
    url = app.serve(page, wait=False)
    try:
        with chromium() as browser:
            shown = browser.new_page(viewport=VIEWPORT, device_scale_factor=SCALE)
            shown.set_default_timeout(SECONDS)
            shown.goto(url)
            shown.locator("#draw").click()
            shown.locator(f"#mode-guided img >> nth={IMAGES - 1}").wait_for()
            shown.locator("#speed table").wait_for()
            shown.mouse.move(0, 0)
            shown.wait_for_timeout(1000)  # until nothing moves
            image = Image.open(io.BytesIO(shown.screenshot(full_page=True))).convert("RGB")
    finally:
        page.close(verbose=False)
    palette = image.quantize(COLOURS, method=Image.Quantize.FASTOCTREE)
    image.quantize(palette=palette).save(folder / "app.png", optimize=True)  # dithered
    print(f"saved {folder / 'app.png'}")
