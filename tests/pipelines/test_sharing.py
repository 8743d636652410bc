"""Several pipelines, guides and threads on one denoiser, each as if it were alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.pipelines import loading as pipelines
from tests import components

Pipe = StableDiffusionPipeline
Draw = Callable[..., torch.Tensor]


def sibling(pipe: Pipe) -> Pipe:
    """Another pipeline on the same denoiser, with scheduler and tokenizer of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    parts = components.own_tokenizers({**pipe.components, "scheduler": scheduler})
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def at_once(*tasks: Callable[[], None]) -> None:
    """Each in a thread of its own, all begun together."""
    start = threading.Barrier(len(tasks))

    def run(task: Callable[[], None]) -> None:
        start.wait()
        task()

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_plain_pipeline_on_the_same_denoiser_goes_on_doing_cfg(
    trained: Guide, pipe: Pipe, draw: Draw, batches: Callable[..., Any]
) -> None:
    plain = sibling(pipe)
    cfg = draw(plain)
    with trained.attached(pipe), batches(pipe.unet) as sizes:
        assert not torch.equal(draw(pipe), cfg)
        assert torch.equal(draw(plain), cfg)
    assert sizes == [1] * 3 + [2] * 3


def test_two_pipelines_on_one_denoiser_carry_the_same_guide(
    trained: Guide, pipe: Pipe, draw: Draw
) -> None:
    other = sibling(pipe)
    with trained.attached(pipe):
        guided = draw(pipe)
        with trained.attached(other):
            assert torch.equal(draw(pipe), guided)
            assert torch.equal(draw(other), guided)
        assert torch.equal(draw(pipe), guided)


def test_two_guides_on_one_denoiser_keep_apart(
    trained: Guide, pipe: Pipe, draw: Draw, randomise: Callable[..., Guide]
) -> None:
    other = sibling(pipe)
    second = randomise(type(trained).for_denoiser(pipe.unet, "epsilon"), seed=12)
    with trained.attached(pipe):
        one = draw(pipe)
    with second.attached(other):
        two = draw(other)
    assert not torch.allclose(one, two)
    with trained.attached(pipe), second.attached(other):
        assert torch.equal(draw(pipe), one)
        assert torch.equal(draw(other), two)


def test_guided_and_plain_threads_share_a_denoiser(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    plain = sibling(pipe)
    cfg = draw(plain, num_inference_steps=8)
    found: dict[str, list[torch.Tensor]] = {"guided": [], "plain": []}

    def work(name: str, pipe: Pipe) -> None:
        found[name] = [draw(pipe, num_inference_steps=8) for _ in range(3)]

    with trained.attached(pipe):
        guided = draw(pipe, num_inference_steps=8)
        at_once(lambda: work("guided", pipe), lambda: work("plain", plain))
    assert [torch.equal(z, guided) for z in found["guided"]] == [True] * 3
    assert [torch.equal(z, cfg) for z in found["plain"]] == [True] * 3


def test_threads_each_have_a_guided_pipeline_on_the_same_weights(
    trained: Guide, pipe: Pipe, draw: Draw
) -> None:
    other = pipelines.sibling(pipe)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "one": lambda: draw(pipe, "cat", negative_prompt="red"),
        "two": lambda: draw(other, ["dog", "a bee"], negative_prompt=["blue", ""]),
    }
    found: dict[str, list[torch.Tensor]] = {}

    def work(name: str) -> None:
        found[name] = [ways[name]() for _ in range(3)]

    with trained.attached(pipe), trained.attached(other):
        expected = {name: way() for name, way in ways.items()}
        at_once(lambda: work("one"), lambda: work("two"))
    for name, drawn in found.items():
        assert [torch.equal(z, expected[name]) for z in drawn] == [True] * 3
    assert len(found) == 2


def test_a_second_call_before_the_first_is_done_is_refused(
    trained: Guide, pipe: Pipe, draw: Draw
) -> None:
    def again(pipe: Pipe, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(GuideError, match="drawing already; for another thread make one"):
            draw(pipe, "dog")
        return given

    with trained.attached(pipe):
        guided = draw(pipe)
        assert torch.equal(draw(pipe, callback_on_step_end=again), guided)


def test_of_two_calls_at_once_one_is_refused(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    found: list[torch.Tensor | GuideError] = []

    def work() -> None:
        try:
            found.append(draw(pipe, num_inference_steps=20))
        except GuideError as error:
            found.append(error)

    with trained.attached(pipe):
        guided = draw(pipe, num_inference_steps=20)
        at_once(work, work)
    refused, drawn = found
    assert "drawing already" in str(refused)
    assert torch.equal(drawn, guided)  # type: ignore[arg-type]
