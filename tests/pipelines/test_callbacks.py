"""Callbacks at the end of a step: they see what they would see, and may turn the guide off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.callbacks import (
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)

from pilotfish.contract import GuideError
from tests.pipelines import hosts
from tests.pipelines.matrix import pipelines

Tensors = dict[str, Any]
Callback = Callable[[Any, int, Any, Tensors], Tensors]


@pytest.mark.parametrize("name", pipelines("callback_on_step_end"))
def test_a_callback_sees_and_changes_the_latents(name: str) -> None:
    steps: list[int] = []

    def clear(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        steps.append(step)
        assert tensors["latents"].any()
        return {"latents": torch.zeros_like(tensors["latents"])}

    host = hosts.host(name)
    with hosts.guide(name).attached(host.pipe):
        assert not host.draw(callback_on_step_end=clear).any()
    assert steps == [0, 1]


def asked(host: hosts.Host, name: str, callback: Any, **call: Any) -> tuple[int, torch.Tensor]:
    """How often the guide is asked in a call, and the latents."""
    calls: list[int] = []
    guide = hosts.guide(name)
    guide.register_forward_pre_hook(lambda *_: calls.append(1))
    with guide.attached(host.pipe):
        latents = host.draw(callback_on_step_end=callback, **call)
    return len(calls), latents


def stop(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    """Guidance ends; no condition is touched."""
    pipe._guidance_scale = 0.0
    return tensors


@pytest.mark.parametrize("name", pipelines("CFG cutoff"))
def test_the_official_cutoff_turns_the_guide_off(name: str) -> None:
    host = hosts.host(name)
    kind = SDCFGCutoffCallback
    if hosts.KINDS[name].xl:
        shows = "image" in host.pipe._callback_tensor_inputs
        kind = SDXLControlnetCFGCutoffCallback if shows else SDXLCFGCutoffCallback
    cut = kind(cutoff_step_ratio=None, cutoff_step_index=0)
    (calls, latents), (expected_calls, expected) = asked(host, name, cut), asked(host, name, stop)
    assert calls == expected_calls == 1
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", pipelines("dynamic CFG"))
def test_halving_what_is_not_doubled_keeps_it_whole(name: str) -> None:
    def halve(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        if step == 0:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    host = hosts.host(name)
    shown = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert asked(host, name, halve, **shown)[0] == 1
    assert torch.equal(asked(host, name, halve, **shown)[1], asked(host, name, stop)[1])


@pytest.mark.parametrize("name", ["SD", "SDXL"])
def test_a_callback_may_encode_texts_of_its_own(name: str) -> None:
    """The negative prompts of the call stay those that it was given."""

    def encode(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        made = pipe.encode_prompt(
            prompt="dog", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert made[1] is None, "a negative prompt that nobody asked for"
        return tensors

    host, negative = hosts.host(name), ["red", "blue"]
    with hosts.guide(name).attached(host.pipe):
        expected = host.draw(negative_prompt=negative)
        assert torch.equal(
            host.draw(negative_prompt=negative, callback_on_step_end=encode), expected
        )


@pytest.mark.parametrize("name", ["SD", "SDXL"])
def test_guidance_that_begins_on_the_way_is_refused_in_words(name: str) -> None:
    def begin(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        pipe._guidance_scale = 4.0
        return tensors

    host = hosts.host(name)
    with hosts.guide(name).attached(host.pipe):
        expected = host.draw()
        for _ in range(2):
            with pytest.raises(GuideError, match="began at a guidance scale of at most 1"):
                host.draw(guidance_scale=1.0, callback_on_step_end=begin)
        assert torch.equal(host.draw(), expected)
