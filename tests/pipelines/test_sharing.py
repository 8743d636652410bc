"""Several pipelines, guides and threads on one denoiser, each as if it were alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pilotfish.interface import GuideError
from pilotfish.pipelines.loading import share_weights
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import Pipeline, build, guide, guided, twin


def at_once(**tasks: Callable[[], Any]) -> dict[str, Any]:
    """What each returns or raises, in a thread of its own, all begun together."""
    start, found = threading.Barrier(len(tasks)), {}

    def run(name: str) -> None:
        start.wait()
        try:
            found[name] = tasks[name]()
        except Exception as error:
            found[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def several(one: Pipeline, **call: Any) -> list[torch.Tensor]:
    return [one.latents(num_inference_steps=6, **call) for _ in range(2)]


@pytest.mark.parametrize("name", covered("threads"))
def test_guided_and_plain_threads_share_a_denoiser(name: str) -> None:
    one = build(name)
    other = twin(one)
    with guide(name).attached(one.pipe):
        expected = {"guided": several(one)[0], "plain": several(other)[0]}
        found = at_once(guided=lambda: several(one), plain=lambda: several(other))
    assert not torch.allclose(expected["guided"], expected["plain"])
    for which, made in found.items():
        assert [torch.equal(latents, expected[which]) for latents in made] == [True] * 2


@pytest.mark.parametrize("name", covered("threads, two precisions"))
def test_one_guide_serves_two_precisions_at_once(name: str) -> None:
    """The pipelines keep what they need of the guide; it stays as it is."""
    one, half, used = build(name, alone=True), build(name, alone=True), guide(name)
    half.pipe.to(torch.bfloat16)
    before = {k: v.clone() for k, v in used.state_dict().items()}
    with used.attached(one.pipe), used.attached(half.pipe):
        expected = {"single": several(one)[0], "half": several(half)[0]}
        found = at_once(single=lambda: several(one), half=lambda: several(half))
        assert used.dtype == torch.float32
    assert half.denoiser.dtype == torch.bfloat16
    for which, made in found.items():
        assert [torch.equal(latents, expected[which]) for latents in made] == [True] * 2
    assert all(torch.equal(v, before[k]) for k, v in used.state_dict().items())


def test_two_pipelines_on_one_denoiser_have_the_same_guide() -> None:
    one, used = build("SD"), guide("SD")
    other = twin(one)
    with used.attached(one.pipe):
        with used.attached(other.pipe):
            assert torch.equal(one.latents(), guided("SD"))
            assert torch.equal(other.latents(), guided("SD"))
        assert torch.equal(one.latents(), guided("SD"))


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_two_guides_on_one_denoiser_keep_apart(name: str) -> None:
    one, second = build(name), guide(name, seed=12)
    other = twin(one)
    with second.attached(other.pipe):
        two = other.latents()
    assert not torch.allclose(guided(name), two)
    with guide(name).attached(one.pipe), second.attached(other.pipe):
        assert torch.equal(one.latents(), guided(name))
        assert torch.equal(other.latents(), two)


@pytest.mark.parametrize("name", ["SD", "PixArt-Sigma"])
def test_threads_each_have_a_guided_pipeline_on_the_same_weights(name: str) -> None:
    one = build(name)
    calls: dict[str, dict[str, Any]] = {
        "one": {"prompt": "cat", "negative_prompt": "red"},
        "two": {"prompt": ["dog", "a bee"], "negative_prompt": ["blue", ""]},
    }
    with guide(name).attached(one.pipe):
        other = Pipeline(share_weights(one.pipe), one.images, one.call)
        assert other.denoiser is not one.denoiser
        weights = zip(one.denoiser.parameters(), other.denoiser.parameters(), strict=True)
        assert all(a is b for a, b in weights)
        both = {"one": one, "two": other}
        expected = {which: several(p, **calls[which])[0] for which, p in both.items()}
        found = at_once(
            one=lambda: several(one, **calls["one"]), two=lambda: several(other, **calls["two"])
        )
    for which, made in found.items():
        assert [torch.equal(latents, expected[which]) for latents in made] == [True] * 2


def test_a_second_call_before_the_first_is_done_is_refused() -> None:
    one = build("SD")

    def again(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(GuideError, match="this pipeline is running in another thread; give"):
            one.latents("dog")
        return tensors

    with guide("SD").attached(one.pipe):
        assert torch.equal(one.latents(callback_on_step_end=again), guided("SD"))
        found = at_once(a=lambda: several(one), b=lambda: several(one))
        expected = several(one)[0]
    kinds = sorted(type(made).__name__ for made in found.values())
    assert kinds == ["GuideError", "list"]
    made = next(made for made in found.values() if isinstance(made, list))
    assert torch.equal(made[0], expected)


def test_a_guide_is_not_detached_while_a_call_runs() -> None:
    one, used = build("SD"), guide("SD")
    refused: list[str] = []

    def leave(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with pytest.raises(GuideError, match="detach its guide when the call has ended") as error:
            used.detach(pipe)
        refused.append(str(error.value))
        return tensors

    with used.attached(one.pipe):
        assert torch.equal(one.latents(callback_on_step_end=leave), guided("SD"))
    assert len(refused) == 2


def test_a_plain_pipeline_called_in_a_callback_is_plain() -> None:
    one = build("SD")
    other, seen = twin(one), []
    expected = other.latents()

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(other.latents())
        return tensors

    with guide("SD").attached(one.pipe):
        assert torch.equal(one.latents(callback_on_step_end=preview), guided("SD"))
    assert [torch.equal(latents, expected) for latents in seen] == [True] * 2


def test_a_copy_made_during_a_call_is_its_own() -> None:
    one, copies = build("SD"), []

    def copied(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        copies.append(share_weights(pipe))
        return tensors

    with guide("SD").attached(one.pipe):
        one.latents(callback_on_step_end=copied)
        assert "encode_prompt" not in vars(copies[0])
        one.pipe.text_encoder = None  # the copy's prompts are encoded by the copy
        other = Pipeline(copies[0], one.images, one.call)
        assert torch.equal(other.latents(), guided("SD"))
