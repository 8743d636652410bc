"""The session draws the library's images, and refuses in words what it cannot draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st
from PIL.Image import Image

from pilotfish.app.session import IMAGES, MODES, Request, RequestError, Session
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.loading import use_deterministic_scheduler
from pilotfish.pipelines.sampling import sample
from tests.app.conftest import guide, pipeline

GOOD: dict[str, Any] = {
    "model": "base", "guide": "tiny", "prompt": "cat", "negative_prompt": "", "seed": 3,
    "guidance_scale": 4.0, "num_inference_steps": 2, "refresh": 0,
}  # fmt: skip
SEEDS = {"base": 0, "tuned": 1, "tiny": 4, "other": 5}


def library_images(request: Request, mode: str) -> list[Image]:
    """The images of a request, by pipelines and guides of their own."""
    pipe = pipeline(SEEDS[request.model])
    samples = sample(
        pipe, [request.prompt] * IMAGES, seeds=[request.seed + i for i in range(IMAGES)],
        guidance_scale=1.0 if mode == "none" else request.guidance_scale,
        num_inference_steps=request.num_inference_steps,
        guide=(
            Refreshed(guide(SEEDS[request.guide]), request.refresh) if mode == "guided" else None
        ),
        negative_prompts=[request.negative_prompt] * IMAGES if request.negative_prompt else None,
    )  # fmt: skip
    images = torch.stack([s.image for s in samples])
    return pipe.image_processor.postprocess(images, output_type="pil")


@pytest.mark.parametrize(
    "changes",
    [{}, {"negative_prompt": "dog"}, {"prompt": ""}, {"model": "tuned", "guide": "other"},
     {"guidance_scale": 1, "seed": 9}, {"refresh": 1}],
)  # fmt: skip
def test_images_are_the_librarys(session: Session, changes: dict[str, Any]) -> None:
    request, reported = Request.of(**GOOD | changes), []
    batches = session.draw(request, lambda *now: reported.append(now))
    assert reported == [("No guidance", 0, 3), ("CFG", 1, 3), ("Guided", 2, 3)]
    assert list(batches) == list(MODES)
    for mode, batch in batches.items():
        assert batch.images == library_images(request, mode)
        assert batch.seconds > 0
    assert batches["guided"].images != batches["cfg"].images or request.guidance_scale == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "nowhere"}, "there is no model 'nowhere'; there are base, tuned"),
        ({"guide": "nowhere"}, "there is no guide 'nowhere'; there are tiny, other, few"),
        ({"model": None}, "model: input should be a valid string, not None"),
        ({"guidance_scale": float("nan")}, "guidance scale: input should be"),
        ({"guidance_scale": 0}, "guidance scale: input should be greater than or equal to 1"),
        ({"guidance_scale": 8.5}, "tiny was trained up to a guidance scale of 8, not 8.5"),
        ({"refresh": 9}, "refresh: input should be less than or equal to 8, not 9"),
        ({"refresh": 1.5}, "refresh: input should be a valid integer"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, not -1"),
        ({"seed": 2**32 - 1}, "seed: input should be less than"),
        ({"num_inference_steps": 101}, "num inference steps: input should be less than or equal"),
        ({"prompt": "x" * 401}, "prompt: string should have at most 400 characters"),
        ({"prompt": "abcdefg"}, "the prompt has 9 tokens, base reads at most 8"),
        ({"negative_prompt": "abcdefg"}, "the negative prompt has 9 tokens"),
        ({"guide": "few", "num_inference_steps": 3}, "few was distilled for 2 steps, not 3"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_in_words(
    session: Session, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(RequestError) as refused:
        session.draw(Request.of(**GOOD | changes))
    assert sentence in str(refused.value)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


@given(st.sampled_from(sorted(GOOD)), ANYTHING)
def test_any_value_is_taken_or_refused_in_one_line(name: str, value: Any) -> None:
    refusal = None
    try:
        request = Request.of(**GOOD | {name: value})
    except RequestError as error:
        refusal = str(error)
    if refusal is None:
        assert type(getattr(request, name)) is type(GOOD[name])
    else:
        assert refusal.startswith(name.replace("_", " "))
        assert "\n" not in refusal


def test_with_a_refresh_at_every_step_the_guided_images_are_those_of_cfg(session: Session) -> None:
    with_none, with_all = (
        session.draw(Request.of(**GOOD | {"refresh": refresh})) for refresh in (0, 2)
    )
    assert with_all["guided"].images == with_all["cfg"].images == with_none["cfg"].images
    assert with_none["guided"].images != with_none["cfg"].images


def test_a_guide_for_few_steps_has_its_own_scheduler_for_one_request() -> None:
    pipe, expected = pipeline(0), pipeline(0)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=False)
    use_deterministic_scheduler(expected)
    few, before = guide(6, times=[0.999, 0.499]), pipe.scheduler
    session = Session({"base": pipe}, {"few": few})
    batches = session.draw(Request.of(**GOOD | {"guide": "few"}))
    samples = sample(
        expected, ["cat"] * IMAGES, seeds=range(3, 3 + IMAGES), guidance_scale=4.0,
        num_inference_steps=2, guide=few,
    )  # fmt: skip
    images = torch.stack([s.image for s in samples])
    assert batches["guided"].images == expected.image_processor.postprocess(images, "pil")
    assert pipe.scheduler is before


def test_a_guide_that_does_not_fit_is_refused() -> None:
    other = pipeline(0, "v_prediction")
    with pytest.raises(ValueError, match=r"no guide fits the model strange: .*prediction_type"):
        Session({"strange": other}, {"tiny": guide(4)})
    with pytest.raises(ValueError, match="at least one model and one guide"):
        Session({}, {"tiny": guide(4)})


def test_a_failed_request_leaves_the_session_as_it_was(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("pilotfish.pipelines.sampling.decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.draw(Request.of(**GOOD))
    assert session.draw(Request.of(**GOOD))["cfg"].images == library_images(
        Request.of(**GOOD), "cfg"
    )
