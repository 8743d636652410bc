"""The page as its visitors meet it: in a browser, and over its API. Nothing leaves loopback."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image, ImageChops
from playwright.sync_api import Locator, Page, expect

from pilotfish import bundled
from pilotfish.app import page as app
from pilotfish.app import shown
from pilotfish.app.drawing import Studio
from pilotfish.app.request import Request
from pilotfish.evaluation.ways import WAYS
from pilotfish.pipelines.sampling import sample
from recipe.screenshots import NoBrowserError, chromium
from tests.app.conftest import Expected, guide, pipeline

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
SECONDS = 60_000


@contextmanager
def served(studio: Studio, folder: Path, **settings: Any) -> Iterator[str]:
    """Where the page of a studio is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GRADIO_TEMP_DIR", str(folder))
        page = app.build(studio, **settings)
        try:
            yield app.serve(page, wait=False)
        finally:
            page.close(verbose=False)


@pytest.fixture(scope="module")
def url(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page is; four may draw at the same time."""
    with served(studio, tmp_path_factory.mktemp("served"), concurrency=4) as url:
        yield url


@pytest.fixture
def page(url: str) -> Iterator[Page]:
    """The page in a browser."""
    with browsed(url) as page:
        yield page


@contextmanager
def browsed(url: str) -> Iterator[Page]:
    """A page in a browser, once its first pictures are there."""
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except NoBrowserError as error:
            pytest.skip(str(error))
        page = browser.new_page(accept_downloads=True)
        page.set_default_timeout(SECONDS)
        page.requested, page.failed = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("pageerror", lambda error: page.failed.append(str(error)))
        page.goto(url)
        expect(page.locator("#way-guided img")).to_be_visible(timeout=SECONDS)
        yield page
        assert page.failed == []


def enter(page: Page, name: str, value: str) -> None:
    field = page.locator(f"#{name} input:not([type=range]), #{name} textarea").first
    field.fill(value)
    field.press("Tab")


def choose(page: Page, name: str, value: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def picture(page: Page, where: str | Locator) -> Image.Image:
    """The picture that a browser shows."""
    image = page.locator(where) if isinstance(where, str) else where
    source = image.get_attribute("src")
    assert source
    if source.startswith("data:"):
        return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    return Image.open(io.BytesIO(page.request.get(source).body()))


def same(found: Image.Image, image: torch.Tensor) -> bool:
    """Whether a picture is the library's (3, H, W), enlarged, pixel for pixel."""
    wanted = shown.picture(image)
    found = found.convert("RGB")
    return found.size == wanted.size and ImageChops.difference(found, wanted).getbbox() is None


def press(page: Page, button: str) -> None:
    """Press a button that draws, and wait until it is done."""
    before = page.locator("#way-guided img").get_attribute("src")
    page.locator(button).click()
    expect(page.locator("#way-guided img")).not_to_have_attribute(
        "src", before or "", timeout=SECONDS
    )


def test_it_opens_with_pictures_and_calls_nobody(page: Page, expected: Expected) -> None:
    prompt, seed = app.EXAMPLES[0]
    first = expected(Request("base", "tiny", prompt, "", seed))
    for way in WAYS:
        assert same(picture(page, f"#way-{way} img"), first[way])
    outside = [u for u in page.requested if not re.match(r"http://127\.0\.0\.1|data:|blob:", u)]
    assert outside == []
    fonts = page.evaluate("getComputedStyle(document.querySelector('#draw')).fontFamily")
    assert "system-ui" in fonts


def test_every_control_counts(page: Page, expected: Expected) -> None:
    enter(page, "prompt", "a cat")
    enter(page, "negative", "dog")
    choose(page, "host", "tuned")
    choose(page, "guide", "other")
    enter(page, "scale", "5.5")
    enter(page, "steps", "3")
    enter(page, "seed", "11")
    press(page, "#draw")
    wanted = expected(Request("tuned", "other", "a cat", "dog", 11, 3, 5.5))
    for way, passes in zip(WAYS, (3, 6, 3), strict=True):
        assert same(picture(page, f"#way-{way} img"), wanted[way])
        expect(page.locator(f"#took-{way}")).to_contain_text(
            re.compile(rf"^\s*{passes} passes, \d+\.\d\d s")
        )
    with page.expect_download() as download:
        page.locator("#grid").click()
    assert download.value.suggested_filename == "a-cat-tuned-seed-11-w-5.5.png"
    assert Image.open(download.value.path()).width > 3 * 256


def test_a_new_seed_is_another(page: Page) -> None:
    seed = page.locator("#seed input")
    page.locator("#another").click()
    expect(seed).not_to_have_value(str(app.EXAMPLES[0][1]))
    assert 0 <= int(seed.input_value()) < 2**32


def test_an_example_is_drawn_when_it_is_clicked(page: Page, expected: Expected) -> None:
    number = [prompt for prompt, _ in app.EXAMPLES].index("rocket")
    enter(page, "steps", "2")
    press(page, f"#gallery .thumbnail-lg >> nth={number}")
    expect(page.locator("#prompt input, #prompt textarea").first).to_have_value("rocket")
    wanted = expected(Request("base", "tiny", *("rocket", ""), app.EXAMPLES[number][1], 2))
    assert same(picture(page, "#way-guided img"), wanted["guided"])


def test_a_strip_is_drawn_and_kept(page: Page, expected: Expected) -> None:
    enter(page, "prompt", "cat")
    enter(page, "steps", "2")
    page.get_by_role("tab", name="By guidance scale").click()
    enter(page, "scales", "4, 1.5")
    page.locator("#draw-strip").click()
    images = page.locator("#strip .strip img")
    expect(images).to_have_count(4, timeout=SECONDS)
    seed = app.EXAMPLES[0][1]
    found = [picture(page, images.nth(i)).convert("RGB") for i in range(4)]
    for i, (way, w) in enumerate((way, w) for way in ("cfg", "guided") for w in (1.5, 4.0)):
        image = expected(Request("base", "tiny", "cat", "", seed, 2, w))[way]
        assert found[i].tobytes() == shown.picture(image, 256).tobytes(), (way, w)
    with page.expect_download() as download:
        page.locator("#strip-grid").click()
    assert download.value.suggested_filename == f"cat-base-seed-{seed}-by-w.png"


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("prompt", "abcdefg", "The prompt has 7 tokens; base reads at most 6"),
        ("seed", "-1", "The seed must be a whole number from 0 to 4,294,967,295, not -1"),
        ("seed", "", "The seed must be a whole number from 0 to 4,294,967,295"),
    ],
)
def test_a_wrong_input_is_answered_in_words(
    page: Page, name: str, value: str, sentence: str
) -> None:
    enter(page, name, value)
    page.locator("#draw").click()
    expect(page.get_by_text(sentence)).to_be_visible(timeout=SECONDS)
    assert "Traceback" not in page.content()


def test_wrong_scales_are_answered_in_words(page: Page) -> None:
    page.get_by_role("tab", name="By guidance scale").click()
    enter(page, "scales", "1, <b>two</b>")
    page.locator("#draw-strip").click()
    expect(page.get_by_text("'<b>two</b>' is none")).to_be_visible(timeout=SECONDS)


GOOD: dict[str, Any] = {
    "host": "base", "guide": "tiny", "prompt": "cat", "negative_prompt": "", "seed": 3,
    "num_inference_steps": 2, "guidance_scale": 4.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"host": "nowhere"}, "There is no host 'nowhere'; there are base, tuned"),
        ({"guide": None}, "There is no guide None"),
        ({"guidance_scale": 1e308}, "w must be from 1 to 8"),
        ({"guidance_scale": "<i>four</i>"}, "w must be a number from 1 to 8"),
        ({"prompt": ["cat"]}, "The prompt must be a text"),
        ({"prompt": "x" * 100_000}, "The prompt has 100,000 characters; at most 400 are read"),
        ({"num_inference_steps": 10**9}, "steps must be a whole number from 1 to 100"),
        ({"seed": {}}, "The seed must be a whole number"),
    ],
)
def test_the_api_answers_a_wrong_input_in_words(
    url: str, changes: dict[str, Any], sentence: str
) -> None:
    client = Client(url, verbose=False)
    with pytest.raises(AppError) as raised:
        client.predict(**GOOD | changes, api_name="/draw")
    assert sentence in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_the_api_gives_a_strip_and_its_file(url: str) -> None:
    asked = {k: v for k, v in GOOD.items() if k != "guidance_scale"}
    html, file = Client(url, verbose=False).predict(**asked, scales="1, 2", api_name="/strip")
    assert html.count("<img") == 4
    assert Image.open(file).width > 256


def test_what_nobody_foresaw_is_said_without_its_inside(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr("pilotfish.pipelines.sampling.decode", fail)
    with pytest.raises(AppError, match=r"Drawing failed; the log of the server says why\."):
        Client(url, verbose=False).predict(**GOOD, api_name="/draw")
    assert "secret inside" in caplog.text


def test_eight_clients_at_once_get_no_wrong_picture(
    url: str, expected: Expected, tmp_path: Path
) -> None:
    requests = [
        GOOD | {"seed": i, "host": ("base", "tuned")[i % 2], "guide": ("tiny", "other")[i // 2 % 2]}
        for i in range(8)
    ]
    right = [expected(Request(**r)) for r in requests]
    until = monotonic() + 4

    def work(number: int) -> int:
        client = Client(url, verbose=False, download_files=tmp_path / str(number))
        turn = number
        while monotonic() < until or turn == number:
            files = client.predict(**requests[turn % 8], api_name="/draw")
            for file, way in zip(files, WAYS, strict=False):
                assert same(Image.open(file), right[turn % 8][way]), (turn, way)
            turn += 1
        return turn - number

    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(work, range(8)))
    assert min(drawn) >= 1


def test_who_comes_when_too_many_wait_is_told_so(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(studio, tmp_path, concurrency=1, waiting=1) as url:
        clients = [Client(url, verbose=False) for _ in range(4)]
        jobs = [c.submit(**GOOD | {"num_inference_steps": 40}, api_name="/draw") for c in clients]
        failed = [e for e in (job.exception(timeout=60) for job in jobs) if e]
        assert failed
        assert all("queue is full" in str(e).lower() for e in failed)
        assert len(failed) < 4


def test_a_port_that_is_taken_is_named(url: str, studio: Studio) -> None:
    port = int(url.rstrip("/").rpartition(":")[2])
    with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is taken; choose another"):
        app.serve(app.build(studio), port=port, wait=False)


def test_a_guide_for_few_steps_brings_their_number(tmp_path: Path) -> None:
    known = {"tiny": guide(4), "few": guide(6, timesteps=[999, 499])}
    with served(Studio({"base": pipeline(0)}, known), tmp_path) as url, browsed(url) as page:
        steps = page.locator("#steps input:not([type=range])").first
        expect(steps).to_have_value("25")
        choose(page, "guide", "few")
        expect(steps).to_have_value("2")
        press(page, "#draw")
        expect(page.locator("#took-guided")).to_contain_text(re.compile(r"^\s*2 passes"))
        choose(page, "guide", "tiny")
        expect(steps).to_have_value("2")


@pytest.mark.slow
def test_the_embedded_model_draws_over_the_page_as_in_the_library(tmp_path: Path) -> None:
    with served(Studio.embedded(), tmp_path) as url:
        client = Client(url, verbose=False)
        for host in bundled.MODELS:
            request = GOOD | {"host": host, "prompt": "owl", "num_inference_steps": 25}
            files = client.predict(**request, api_name="/draw")
            call = {"seeds": [3], "guidance_scale": 4.0, "guide": bundled.load_guide()}
            (one,) = sample(bundled.load_model(host), ["owl"], **call)
            assert same(Image.open(files[2]), one.image), host
