"""The page in a browser and over its API. Nothing leaves loopback."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page, expect

from pilotfish.app import page as app
from pilotfish.app.session import IMAGES, MODES, Request, Session
from recipe.screenshots import NoBrowserError, chromium
from tests.app.test_session import GOOD, library_images

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
SECONDS = 60_000


@pytest.fixture(scope="module")
def url(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("served")))
        page = app.build(session)
        try:
            yield app.serve(page, wait=False)
        finally:
            page.close(verbose=False)


@contextmanager
def opened(url: str) -> Iterator[Page]:
    """The page in the system's Chromium."""
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except NoBrowserError as error:
            pytest.skip(str(error))
        page = browser.new_page()
        page.set_default_timeout(SECONDS)
        failed: list[str] = []
        page.on("pageerror", lambda error: failed.append(str(error)))
        yield page
        assert failed == []


def enter(page: Page, name: str, value: str) -> None:
    field = page.locator(f"#{name} input:not([type=range]), #{name} textarea").first
    field.fill(value)
    field.press("Tab")


def choose(page: Page, name: str, value: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def same(found: Any, image: Image.Image) -> bool:
    """Whether a file holds an image, enlarged, pixel for pixel."""
    return bool(Image.open(found).convert("RGB") == app.enlarged(image))


def test_every_control_counts_and_nobody_else_is_called(url: str) -> None:
    requested: list[str] = []
    with opened(url) as page:
        page.on("request", lambda request: requested.append(request.url))
        page.goto(url)
        enter(page, "prompt", "a cat")
        enter(page, "negative-prompt", "dog")
        choose(page, "model", "tuned")
        choose(page, "guide", "other")
        enter(page, "guidance-scale", "5.5")
        enter(page, "refresh", "1")
        enter(page, "steps", "3")
        expect(page.locator("#passes")).to_contain_text("4 passes in place of 6, 2 saved")
        enter(page, "seed", "11")
        page.locator("#draw").click()
        wanted = Request("tuned", "other", "a cat", "dog", 5.5, 3, 11, 1)
        for mode in MODES:
            found = page.locator(f"#mode-{mode} img")
            expect(found).to_have_count(IMAGES, timeout=SECONDS)
            for i, image in enumerate(library_images(wanted, mode)):
                source = found.nth(i).get_attribute("src") or ""
                assert same(io.BytesIO(page.request.get(source).body()), image), (mode, i)
        expect(page.locator("#speed")).to_contain_text(re.compile(r"Guided\s*\d+\.\d\d"))
    outside = [u for u in requested if not re.match(r"http://127\.0\.0\.1|data:|blob:", u)]
    assert outside == []


def test_a_refusal_is_shown_and_a_guide_for_few_steps_sets_them(url: str) -> None:
    with opened(url) as page:
        page.goto(url)
        enter(page, "prompt", "abcdefg")
        page.locator("#draw").click()
        sentence = "The prompt has 9 tokens, base reads at most 8"
        expect(page.get_by_text(sentence)).to_be_visible(timeout=SECONDS)
        steps, seed = (
            page.locator(f"#{name} input:not([type=range])").first for name in ("steps", "seed")
        )
        expect(steps).to_have_value("25")
        choose(page, "guide", "few")
        expect(steps).to_have_value("2")
        choose(page, "guide", "tiny")
        expect(steps).to_have_value("2")
        page.locator("#new-seed").click()
        expect(seed).not_to_have_value("0")


def test_clients_at_once_get_the_images_that_they_asked_for(url: str, tmp_path: Path) -> None:
    requests = [GOOD | {"seed": 9 * i, "model": ("base", "tuned")[i % 2]} for i in range(2)]
    expected = [library_images(Request.of(**r), "guided") for r in requests]

    def work(number: int) -> list[str]:
        client = Client(url, verbose=False, download_files=tmp_path / str(number))
        none, cfg, guided, speed = client.predict(**requests[number], api_name="/draw")
        assert len(none) == len(cfg) == IMAGES
        assert re.search(r"\| CFG \| \d+\.\d\d \| 1\.00× \|", speed)
        return [file["image"] for file in guided]

    with ThreadPoolExecutor(2) as pool:
        for files, images in zip(pool.map(work, range(2)), expected, strict=True):
            assert all(map(same, files, images))


def test_the_api_refuses_in_words(url: str, caplog: pytest.LogCaptureFixture) -> None:
    client = Client(url, verbose=False)
    for changes, sentence in (
        ({"model": "nowhere"}, "There is no model 'nowhere'; there are base, tuned"),
        ({"guidance_scale": "<i>four</i>"}, "Guidance scale: input should be a valid number, not"),
        ({"seed": {}}, "Seed: input should be a valid integer, not {}"),
        ({"refresh": 9}, "Refresh: input should be less than or equal to 8, not 9"),
    ):
        with pytest.raises(AppError) as raised:
            client.predict(**GOOD | changes, api_name="/draw")
        assert sentence in str(raised.value)
        assert "<i>" not in str(raised.value)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pilotfish.app.session.use_deterministic_scheduler", lambda pipe: 1 / 0)
        with pytest.raises(AppError, match=r"Drawing failed; the log of the server says why\."):
            client.predict(**GOOD | {"guide": "few"}, api_name="/draw")
    assert "ZeroDivisionError" in caplog.text


def test_a_port_that_is_taken_is_named(url: str, session: Session) -> None:
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is taken; choose another"):
        app.serve(app.build(session), port=port, wait=False)
