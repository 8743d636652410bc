"""Callbacks at the end of a step: they see what they would see, and may turn the guide off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.callbacks import (
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)

from pilotfish.backbones.extrapolation import Pushing
from pilotfish.interface import GuideError
from tests.pipelines import hosts
from tests.pipelines.matrix import pipelines
from tests.pipelines.test_conditions import lora

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


def once(change: Callable[[Any], Any]) -> Callback:
    """A callback that does something after the first step, and gives what that returns."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        return (change(pipe) if step == 0 else None) or tensors

    return callback


@pytest.mark.parametrize("shown", [[], ["prompt_embeds"]])
@pytest.mark.parametrize("name", pipelines("conditions from a callback"))
def test_conditions_may_be_given_for_both_halves(name: str, shown: list[str]) -> None:
    """As a callback has to give them under classifier-free guidance."""
    host, guide = hosts.host(name), hosts.guide(name)
    negative, prompt = ["red", "blue"], ["dog", "a"]
    made = host.pipe.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
        negative_prompt=negative,
    )  # fmt: skip
    both = {"prompt_embeds": torch.cat([made[1], made[0]])}
    if hosts.KINDS[name].xl:
        both["add_text_embeds"] = torch.cat([made[3], made[2]])
    callback = once(lambda pipe: dict(both))
    call = {"callback_on_step_end_tensor_inputs": ["latents", *shown]}
    host.draw(callback_on_step_end=callback, **call)  # it does with CFG
    seen: list[Any] = []
    guide.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with guide.attached(host.pipe), host.batches() as sizes:
        host.draw(callback_on_step_end=callback, **call)
    assert set(sizes) == {2}
    torch.testing.assert_close(seen[-1].encoder_hidden_states, made[0])
    torch.testing.assert_close(seen[-1].negative_hidden_states, made[1])
    assert not torch.equal(seen[0].encoder_hidden_states, made[0])
    assert not torch.equal(seen[0].negative_hidden_states, made[1])


@pytest.mark.parametrize("name", pipelines("LoRA from a callback"))
def test_a_lora_may_be_loaded_on_the_way(name: str) -> None:
    host, layers = hosts.host(name), lora(name)
    with hosts.guide(name).attached(host.pipe):
        plain = host.draw()
        loading = once(lambda pipe: pipe.load_lora_weights(layers))
        found = host.draw(callback_on_step_end=loading)
        host.pipe.disable_lora()
        again = host.draw(callback_on_step_end=once(lambda pipe: pipe.enable_lora()))
    torch.testing.assert_close(again, found, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, plain, atol=1e-1)


@pytest.mark.parametrize("name", pipelines("denoiser from a callback"))
def test_the_denoiser_may_be_exchanged_on_the_way(name: str) -> None:
    host = hosts.host(name)
    other = copy.deepcopy(host.pipe.unet)
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw()
        exchange = once(lambda pipe: setattr(pipe, "unet", other))
        assert torch.equal(host.draw(callback_on_step_end=exchange), guided)
        assert host.pipe.unet is other


@pytest.mark.parametrize("name", pipelines("weights from a callback"))
def test_weights_may_change_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept of the negative prompt is not kept beyond that."""

    @torch.no_grad()
    def turn(pipe: Any) -> None:
        for layer, module in pipe.unet.named_modules():
            if layer.endswith("attn2"):
                module.to_k.weight.mul_(1.5)

    found, negative = [], ["red", "blue"]  # the null prompt of SDXL is zeros, and so are its keys
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(Pushing, "_keep", lambda self, owner, parts, make: make())
        host = hosts.host(name)
        with hosts.guide(name).attached(host.pipe):
            found.append(
                host.draw(
                    negative_prompt=negative, callback_on_step_end=once(turn), num_inference_steps=3
                )
            )
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["SD"])
def test_what_cfg_has_made_a_copy_of_may_be_overwritten(name: str) -> None:
    host = hosts.host(name)

    def clear(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        tensors["negative_prompt_embeds"].zero_()
        return {}

    call: dict[str, Any] = {"negative_prompt": ["red", "blue"]}
    shown = {"callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw(**call)
        assert torch.equal(host.draw(callback_on_step_end=clear, **shown, **call), guided)


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
