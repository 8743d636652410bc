"""The studio: the picture of a seed is the library's, whoever else is drawing."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

from pilotfish.app import shown
from pilotfish.app.drawing import Picture, Studio
from pilotfish.app.request import Limits, Request, RequestError
from pilotfish.evaluation.cost import counted_rows
from pilotfish.evaluation.ways import WAYS
from pilotfish.pipelines.loading import sibling, take_ddim_steps
from pilotfish.pipelines.sampling import sample
from tests.app.conftest import Expected, guide, guides, pipeline

ASKED = Request("base", "tiny", "cat", "", seed=3, num_inference_steps=3, guidance_scale=4.0)
VALUES: dict[str, Any] = vars(ASKED)


def asked(**changes: Any) -> Request:
    return Request(**VALUES | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"negative_prompt": "dog"}, {"prompt": ""}, {"host": "tuned"}, {"guide": "other"},
     {"guidance_scale": 1.0}, {"seed": 2**32 - 1}],
)  # fmt: skip
def test_a_picture_is_the_librarys(
    studio: Studio, expected: Expected, changes: dict[str, Any]
) -> None:
    request = studio.request(**VALUES | changes)
    drawn = studio.ways(request)
    assert list(drawn) == list(WAYS)
    for way, image in expected(request).items():
        assert torch.equal(drawn[way].image, image)


def test_every_part_of_a_request_counts(studio: Studio) -> None:
    plain = studio.ways(ASKED)["guided"].image
    for change in (
        {"host": "tuned"}, {"guide": "other"}, {"prompt": "dog"}, {"negative_prompt": "dog"},
        {"seed": 4}, {"num_inference_steps": 4}, {"guidance_scale": 5.0},
    ):  # fmt: skip
        assert not torch.equal(studio.ways(asked(**change))["guided"].image, plain), change


def test_passes_and_seconds_are_those_of_each_way(studio: Studio) -> None:
    drawn = studio.ways(ASKED)
    assert {way: p.passes for way, p in drawn.items()} == {"none": 3, "cfg": 6, "guided": 3}
    assert all(p.seconds > 0 for p in drawn.values())


def test_eight_threads_draw_no_wrong_picture(studio: Studio, expected: Expected) -> None:
    requests = [
        asked(
            host=("base", "tuned")[i % 2], guide=("tiny", "other")[i // 2 % 2], seed=i,
            prompt=("cat", "a", "")[i % 3], negative_prompt=("", "a dog")[i % 2],
            guidance_scale=2.0 + i % 3,
        )
        for i in range(24)
    ]  # fmt: skip
    right = [expected(r) for r in requests]
    start = threading.Barrier(8)

    def work(thread: int) -> list[dict[str, Picture]]:
        start.wait()
        return [studio.ways(r) for r in requests[thread:] + requests[:thread]]

    with ThreadPoolExecutor(8) as pool:
        everything = list(pool.map(work, range(8)))
    for thread, drawn in enumerate(everything):
        for found, wanted in zip(drawn, right[thread:] + right[:thread], strict=True):
            assert all(torch.equal(found[way].image, wanted[way]) for way in WAYS)
            assert [found[way].passes for way in WAYS] == [3, 6, 3]


def test_a_strip_holds_the_pictures_of_its_scales(studio: Studio) -> None:
    reported: list[tuple[str, int, int]] = []
    rows = studio.strip(ASKED, [1.0, 2.5, 4.0], lambda *now: reported.append(now))
    assert list(rows) == ["cfg", "guided"]
    for w, cfg, guided in zip([1.0, 2.5, 4.0], rows["cfg"], rows["guided"], strict=True):
        alone = studio.ways(asked(guidance_scale=w))
        assert torch.equal(cfg.image, alone["cfg"].image)
        assert torch.equal(guided.image, alone["guided"].image)
    assert torch.equal(rows["cfg"][0].image, rows["guided"][0].image)
    assert reported[0] == ("CFG, w = 1", 0, 6)
    assert [done for _, done, _ in reported] == list(range(6))


def test_examples_are_guided_pictures(studio: Studio) -> None:
    requests = [asked(prompt="cat", seed=1), asked(prompt="a dog", seed=2)]
    for image, request in zip(studio.guided(requests), requests, strict=True):
        alone = studio.ways(request)["guided"].image
        torch.testing.assert_close(image, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"host": "nowhere"}, "there is no host 'nowhere'; there are base, tuned"),
        ({"host": None}, "there is no host None"),
        ({"guide": ["tiny"]}, "there is no guide"),
        ({"guidance_scale": float("nan")}, "w must be a number from 1 to 8"),
        ({"guidance_scale": 10**400}, r"w must be from 1 to 8, not 1\.79769e\+308"),
        ({"guidance_scale": 8.5}, "w must be from 1 to 8, not 8.5"),
        ({"guidance_scale": 0}, "w must be from 1 to 8, not 0"),
        ({"seed": -1}, "the seed must be a whole number from 0"),
        ({"seed": 0.5}, "the seed must be a whole number"),
        ({"num_inference_steps": 101}, "the number of steps must be a whole number from 1 to 100"),
        ({"prompt": "x" * 401}, "the prompt has 401 characters; at most 400 are read"),
        ({"negative_prompt": 3}, "the negative prompt must be a text"),
    ],
)
def test_what_cannot_be_asked_is_said(
    studio: Studio, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        studio.request(**VALUES | changes)


def test_a_text_that_the_host_would_cut_is_refused(studio: Studio) -> None:
    for name, what in (("prompt", "the prompt"), ("negative_prompt", "the negative prompt")):
        studio.ways(asked(**{name: "abcdef"}))
        with pytest.raises(RequestError, match=f"{what} has 7 tokens; base reads at most 6"):
            studio.ways(asked(**{name: "abcdefg"}))


def test_a_guide_that_does_not_fit_is_refused_and_nothing_else_suffers(expected: Expected) -> None:
    other = pipeline(0)
    other.scheduler.register_to_config(prediction_type="v_prediction")
    studio = Studio({"base": pipeline(0), "strange": other}, guides() | {"few": few()})
    with pytest.raises(RequestError, match=r"tiny does not fit strange: .*prediction_type"):
        studio.ways(asked(host="strange"))
    with pytest.raises(RequestError, match="few was distilled for 2 steps, not 3"):
        studio.ways(asked(guide="few"))
    assert torch.equal(studio.ways(ASKED)["guided"].image, expected(ASKED)["guided"])


def test_a_guide_for_few_steps_takes_them_on_a_host_with_another_scheduler() -> None:
    host, expected = pipeline(0), pipeline(0)
    host.scheduler = PNDMScheduler.from_config(host.scheduler.config, skip_prk_steps=False)
    take_ddim_steps(expected)
    studio = Studio({"base": host}, guides() | {"few": few()})
    plain = studio.ways(asked(num_inference_steps=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a guide that is asked for other steps
        drawn = studio.ways(asked(guide="few", num_inference_steps=2))
    call: dict[str, Any] = {"seeds": [3], "guidance_scale": 4.0, "num_inference_steps": 2}
    (guided,) = sample(expected, ["cat"], guide=few(), **call)
    (cfg,) = sample(expected, ["cat"], **call)
    assert torch.equal(drawn["guided"].image, guided.image)
    assert torch.equal(drawn["cfg"].image, cfg.image)
    # and its own scheduler is back: PNDM asks more often than it has steps
    again = studio.ways(asked(num_inference_steps=5))
    assert plain["guided"].passes > 5
    assert all(torch.equal(plain[way].image, again[way].image) for way in WAYS)


def few() -> Any:
    return guide(4, timesteps=[999, 499])


def test_a_drawing_that_fails_leaves_its_seat_as_it_was(
    studio: Studio, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("pilotfish.pipelines.sampling.decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            studio.ways(ASKED)
    drawn = studio.ways(ASKED)
    assert all(torch.equal(drawn[way].image, image) for way, image in expected(ASKED).items())


def test_a_studio_that_cannot_be_says_why() -> None:
    with pytest.raises(ValueError, match="at least one host and one guide"):
        Studio({}, guides())
    with pytest.raises(ValueError, match=r"base draws pictures of 16 pixels; .* up to 8"):
        Studio({"base": pipeline(0)}, guides(), Limits(side=8))


def test_siblings_share_weights_and_nothing_that_changes() -> None:
    pipe = pipeline(0)
    other = sibling(pipe)
    pairs = zip(pipe.unet.parameters(), other.unet.parameters(), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert other.vae is pipe.vae
    for name in ("unet", "scheduler", "tokenizer"):
        assert getattr(other, name) is not getattr(pipe, name)
    call: dict[str, Any] = {"seeds": [1], "guidance_scale": 3.0, "num_inference_steps": 2}
    (before,) = sample(pipe, ["cat"], **call)
    with guide(4).attached(other), counted_rows(pipe.unet) as rows:
        (after,) = sample(pipe, ["cat"], **call)
        (guided,) = sample(other, ["cat"], **call)
    assert rows == [2, 2]
    assert torch.equal(before.image, after.image)
    assert not torch.equal(before.image, guided.image)


def test_what_is_kept_shows_every_picture(studio: Studio) -> None:
    drawn, rows = studio.ways(ASKED), studio.strip(ASKED, [1.0, 4.0])
    three, several = shown.grid(ASKED, drawn), shown.strip_grid([1.0, 4.0], rows)
    assert three.width > 3 * 256
    assert several.height > 2 * 128
    assert "<b>3</b> passes" in shown.figures([drawn["none"]])
    assert "<b>6</b> passes" in shown.figures([drawn["cfg"]])


def test_a_strip_on_the_page_holds_its_pictures_and_no_markup_of_others(studio: Studio) -> None:
    request = asked(prompt='"><b>')
    html = shown.strip(request, [1.0, 4.0], studio.strip(request, [1.0, 4.0]))
    assert html.count("<img src=") == 4
    assert "&quot;&gt;&lt;b&gt;, guided, w = 4" in html
    assert '"><b>,' not in html


def test_a_file_is_named_after_what_it_shows() -> None:
    request = asked(prompt="An Owl / ../with a crown", host="folder/of mine")
    assert shown.file_name(request, "w 4.5") == "an-owl-..-with-a-crown-of-mine-seed-3-w-4.5"
    assert "/" not in shown.file_name(asked(prompt="../" * 50))
    assert shown.file_name(asked(prompt="猫")) == "base-seed-3"
