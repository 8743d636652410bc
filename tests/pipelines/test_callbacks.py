"""Callbacks at the end of a step: they see what they would see, and may turn the guide off."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.callbacks import (
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
    SDXLControlnetCFGCutoffCallback,
)

from pilotfish.backbones.cache import CallCache
from pilotfish.interface import GuideError
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import Pipeline, build, guide, guided, plain
from tests.pipelines.specs import PIPELINES
from tests.pipelines.test_conditions import load_lora
from tests.pipelines.test_core import NEGATIVE, encode, parts

Tensors = dict[str, Any]
Callback = Callable[[Any, int, Any, Tensors], Tensors]


@pytest.mark.parametrize("name", covered("callback_on_step_end"))
def test_a_callback_sees_and_changes_the_latents(name: str) -> None:
    steps: list[int] = []

    def clear(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        steps.append(step)
        assert tensors["latents"].any()
        return {"latents": torch.zeros_like(tensors["latents"])}

    one = build(name)
    with guide(name).attached(one.pipe):
        assert not one.latents(callback_on_step_end=clear).any()
    assert steps[:2] == [0, 1]


@pytest.mark.parametrize("name", covered("callback"))
def test_a_callback_of_the_older_kind_sees_the_latents(name: str) -> None:
    seen: list[torch.Tensor] = []
    one = build(name)
    with guide(name).attached(one.pipe):
        last = one.latents(callback=lambda step, timestep, latents: seen.append(latents))
    assert torch.equal(seen[-1], last)
    assert torch.equal(last, guided(name))


def calls_of_the_guide(
    one: Pipeline, name: str, callback: Any, **call: Any
) -> tuple[int, torch.Tensor]:
    """How often the guide runs in a call, and the latents."""
    calls: list[int] = []
    used = guide(name)
    used.register_forward_pre_hook(lambda *_: calls.append(1))
    with used.attached(one.pipe):
        latents = one.latents(callback_on_step_end=callback, **call)
    return len(calls), latents


def stop(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
    """Guidance ends; no condition is touched."""
    pipe._guidance_scale = 0.0
    return tensors


@pytest.mark.parametrize("name", covered("CFG cutoff"))
def test_the_official_cutoff_turns_the_guide_off(name: str) -> None:
    one = build(name)
    kind: Any = {"SD": SDCFGCutoffCallback, "SD3": SD3CFGCutoffCallback}.get(PIPELINES[name].family)
    if kind is None:
        images = "image" in one.pipe._callback_tensor_inputs
        kind = SDXLControlnetCFGCutoffCallback if images else SDXLCFGCutoffCallback
    cut = kind(cutoff_step_ratio=None, cutoff_step_index=0)
    calls, latents = calls_of_the_guide(one, name, cut)
    expected_calls, expected = calls_of_the_guide(one, name, stop)
    assert calls == expected_calls == 1
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", covered("dynamic CFG"))
def test_halving_what_is_not_doubled_keeps_it_whole(name: str) -> None:
    one = build(name)
    names = [n for n in ("prompt_embeds", "pooled_prompt_embeds")
             if n in one.pipe._callback_tensor_inputs]  # fmt: skip

    def halve(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        if step == 0:
            tensors |= {n: tensors[n].chunk(2)[-1] for n in names}
            pipe._guidance_scale = 0.0
        return tensors

    inputs = {"callback_on_step_end_tensor_inputs": names}
    calls, latents = calls_of_the_guide(one, name, halve, **inputs)
    assert calls == 1
    assert torch.equal(latents, calls_of_the_guide(one, name, stop)[1])


def once(change: Callable[[Any], Any]) -> Callback:
    """A callback that does something after the first step, and gives what that returns."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        return (change(pipe) if step == 0 else None) or tensors

    return callback


@pytest.mark.parametrize("name", ["SD", "SDXL", "SD3"])
def test_a_callback_may_encode_texts_of_its_own(name: str) -> None:
    """The negative prompts of the call stay those that it was given."""
    one = build(name)

    def encode_another(pipe: Any) -> None:
        made = encode(one, ["dog"], do_classifier_free_guidance=False)
        assert made[1] is None, "a negative prompt that nobody asked for"

    with guide(name).attached(one.pipe):
        expected = one.latents(negative_prompt=NEGATIVE)
        callback = once(encode_another)
        assert torch.equal(
            one.latents(negative_prompt=NEGATIVE, callback_on_step_end=callback), expected
        )


@pytest.mark.parametrize("inputs", [[], ["prompt_embeds"]])
@pytest.mark.parametrize("name", covered("conditions from a callback"))
def test_conditions_may_be_given_for_both_halves(name: str, inputs: list[str]) -> None:
    """As a callback has to give them under classifier-free guidance."""
    one, used = build(name), guide(name)
    made = encode(one, ["dog", "a"], negative_prompt=NEGATIVE)
    both = {"prompt_embeds": torch.cat([made[1], made[0]])}
    if len(made) == 4:
        pooled = "pooled_prompt_embeds" if PIPELINES[name].family == "SD3" else "add_text_embeds"
        both[pooled] = torch.cat([made[3], made[2]])
    callback = once(lambda pipe: dict(both))
    call = {"callback_on_step_end_tensor_inputs": ["latents", *inputs]}
    one.latents(callback_on_step_end=callback, **call)  # it does with CFG
    seen: list[Any] = []
    used.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with used.attached(one.pipe), one.batches() as sizes:
        one.latents(callback_on_step_end=callback, **call)
    assert set(sizes) == {2}
    for found, expected in ((seen[-1].text, made[::2]), (seen[-1].negative, made[1::2])):
        for part, other in zip(parts(found), expected, strict=True):
            torch.testing.assert_close(part, other)
    assert not torch.equal(seen[0].text.embeds, made[0])
    assert not torch.equal(seen[0].negative.embeds, made[1])


@pytest.mark.parametrize("name", covered("LoRA from a callback"))
def test_a_lora_may_be_loaded_on_the_way(name: str) -> None:
    one = build(name)
    with guide(name).attached(one.pipe):
        found = one.latents(callback_on_step_end=once(lambda pipe: load_lora(one, name)))
        one.pipe.disable_lora()
        again = one.latents(callback_on_step_end=once(lambda pipe: pipe.enable_lora()))
    torch.testing.assert_close(again, found, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found, guided(name), atol=1e-2)


@pytest.mark.parametrize("name", covered("denoiser from a callback"))
def test_the_denoiser_may_be_exchanged_on_the_way(name: str) -> None:
    one = build(name)
    other = copy.deepcopy(one.denoiser)
    with guide(name).attached(one.pipe):
        exchange = once(lambda pipe: setattr(pipe, one.component, other))
        assert torch.equal(one.latents(callback_on_step_end=exchange), guided(name))
        assert one.denoiser is other


@pytest.mark.parametrize("name", covered("weights from a callback"))
def test_weights_may_change_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was cached of the negative prompt is not used beyond that."""
    which = (
        ("add_k_proj", "context_embedder") if PIPELINES[name].family == "SD3" else ("attn2.to_k",)
    )

    @torch.no_grad()
    def change(pipe: Any) -> None:
        for layer, module in getattr(pipe, one.component).named_modules():
            if layer.endswith(which):
                module.weight.mul_(1.5)

    found = []
    for cached in (True, False):
        if not cached:
            monkeypatch.setattr(CallCache, "made_by", lambda self, key, make, parts=(): make())
        one = build(name)
        with guide(name).attached(one.pipe):
            found.append(
                one.latents(
                    negative_prompt=NEGATIVE,  # the null prompt of SDXL is zeros, as are its keys
                    callback_on_step_end=once(change),
                    num_inference_steps=3,
                )
            )
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["SD", "SD3 img2img"])
def test_what_cfg_has_made_a_copy_of_may_be_overwritten(name: str) -> None:
    one = build(name)

    def clear(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        tensors["negative_prompt_embeds"].zero_()
        return {}

    call: dict[str, Any] = {"negative_prompt": NEGATIVE}
    inputs = {"callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}
    with guide(name).attached(one.pipe):
        expected = one.latents(**call)
        made = one.latents(callback_on_step_end=clear, **inputs, **call)
        # with a callback at every step, modulations are computed at the step
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_guidance_that_begins_on_the_way_is_refused_in_words(name: str) -> None:
    def begin(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        pipe._guidance_scale = 4.0
        return tensors

    one = build(name)
    with guide(name).attached(one.pipe):
        for _ in range(2):
            with pytest.raises(GuideError, match="began at a guidance scale of at most 1"):
                one.latents(guidance_scale=1.0, callback_on_step_end=begin)
        assert torch.equal(one.latents(), guided(name))


@pytest.mark.parametrize("name", ["Wan", "CogView4"])
def test_other_negative_embeddings_from_a_callback_reach_the_guide_where_they_reach_cfg(
    name: str,
) -> None:
    one, used = build(name), guide(name, trained=False)
    seen: list[torch.Tensor] = []
    used.register_forward_pre_hook(lambda _, args: seen.append(args[0].negative.embeds))

    def double(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {"negative_prompt_embeds": 2 * given["negative_prompt_embeds"]}

    call = {
        "callback_on_step_end": double,
        "callback_on_step_end_tensor_inputs": ["latents", "negative_prompt_embeds"],
    }
    assert not torch.equal(one.latents(**call), plain(name))
    with used.attached(one.pipe):
        one.latents(**call)
    first, second = seen
    torch.testing.assert_close(second, 2 * first)
