"""Refreshing with all that a call is conditioned on, and with callbacks that change it."""

from __future__ import annotations

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
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor

from pilotfish.backbones import Backbone
from pilotfish.interface import GuideError, GuideInputs
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import Pipeline, build, guide, plain
from tests.pipelines.specs import MASKED, PIPELINES, SIDE
from tests.pipelines.test_callbacks import Tensors, once, stop
from tests.pipelines.test_conditions import WIDTH, load_ip_adapter, load_lora
from tests.pipelines.test_core import NEGATIVE, encode, given_embeddings
from tests.pipelines.test_refresh import ALL, BOTH, drawn, longer

pytestmark = pytest.mark.usefixtures("encoded_alike")


def is_cfg(one: Pipeline, name: str, **call: Any) -> None:
    """With both passes in every step the call gives what it gives without a guide."""
    expected = one.latents(**call)
    torch.testing.assert_close(drawn(one, ALL, name, **call), expected, rtol=1e-5, atol=1e-5)


def inputs_of(one: Pipeline, name: str, refresh: Any, **call: Any) -> list[GuideInputs]:
    """What the guide is given in the steps that it guides."""
    seen: list[GuideInputs] = []
    used = guide(name)
    used.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with used.attached(one.pipe, refresh=refresh):
        one.latents(**call)
    return seen


@pytest.mark.parametrize("name", covered("negative_prompt"))
def test_each_image_has_its_own_negative_prompt(name: str) -> None:
    one = build(name)
    is_cfg(one, name, negative_prompt=NEGATIVE)
    assert not torch.allclose(one.latents(negative_prompt=NEGATIVE), plain(name))


@pytest.mark.parametrize("name", covered("num_images_per_prompt"))
def test_several_images_of_each_prompt(name: str) -> None:
    one = build(name)
    call: dict[str, Any] = {"num_images_per_prompt": 2, "negative_prompt": NEGATIVE}
    is_cfg(one, name, **call)
    with guide(name).attached(one.pipe, refresh=[1]), one.batches() as sizes:
        one.latents(**call)
    assert sizes[:2] == [4, 8]


@pytest.mark.parametrize("name", covered("prompt_embeds"))
def test_given_embeddings(name: str) -> None:
    one = build(name)
    given: dict[str, Any] = given_embeddings(one, name)
    if PIPELINES[name].family in MASKED:
        given["negative_prompt"] = None
    is_cfg(one, name, prompt=None, **given)


@pytest.mark.parametrize("name", ["SD", "SD, v", "SDXL", "SD3", "PixArt-Sigma"])
def test_the_guide_is_given_the_difference_that_was_found(name: str) -> None:
    one, backbone = build(name), Backbone.of(build(name).denoiser)
    found: list[torch.Tensor] = []
    handle = one.denoiser.register_forward_hook(lambda m, a, made: found.append(made[0]))
    one.latents(negative_prompt=NEGATIVE)
    handle.remove()
    unconditional, conditional = (backbone.on_grid(x) for x in found[0].chunk(2))
    call = {"negative_prompt": NEGATIVE, "num_inference_steps": 4}
    seen = inputs_of(one, name, [0, 2], **call)
    first, last = seen[0].refresh, seen[1].refresh
    assert len(seen) == 2
    assert first is not None
    assert last is not None
    close = {"rtol": 1e-4, "atol": 1e-5}
    if name != "SD3":  # whose first timestep is the same; its schedule is another
        torch.testing.assert_close(first.conditional, conditional, **close)
        torch.testing.assert_close(first.difference, conditional - unconditional, **close)
    assert first.known.tolist() == [1.0, 1.0]
    assert (first.time > seen[0].time).all()
    assert (first.time > last.time).all()
    assert (last.time > seen[1].time).all()


@pytest.mark.parametrize("name", covered("IP-Adapter, image"))
def test_an_image_as_a_prompt(name: str) -> None:
    """The unconditional pass has the embeddings that stand for no image."""
    one = build(name)
    load_ip_adapter(one)
    image = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(11))
    call = {"ip_adapter_image": [one.pipe.image_processor.postprocess(2 * image - 1)]}
    is_cfg(one, name, **call)


@pytest.mark.parametrize("name", covered("IP-Adapter, embeds"))
def test_an_image_given_by_its_doubled_embeddings(name: str) -> None:
    one = build(name)
    load_ip_adapter(one)
    embeds = torch.randn(4, 1, WIDTH, generator=torch.Generator().manual_seed(11))
    is_cfg(one, name, ip_adapter_image_embeds=[embeds])


def test_the_mask_of_an_image_stays_one() -> None:
    """It has one row, as has the batch of a single prompt."""
    one = build("SD")
    load_ip_adapter(one)
    generator = torch.Generator().manual_seed(11)
    call: dict[str, Any] = {
        "prompt": "cat",
        "ip_adapter_image_embeds": [torch.randn(2, 1, WIDTH, generator=generator)],
        "cross_attention_kwargs": {
            "ip_adapter_masks": [torch.rand(1, 1, SIDE, SIDE, generator=generator).round()]
        },
    }  # fmt: skip
    is_cfg(one, "SD", **call)
    assert len(inputs_of(one, "SD", [0], **call)) == 1


def test_an_image_as_a_prompt_of_sd3() -> None:
    one, name = build("SD3"), "SD3"
    net = one.denoiser
    torch.manual_seed(10)
    width = net.inner_dim
    processors = {
        layer: SD3IPAdapterJointAttnProcessor2_0(
            width, width, net.config.attention_head_dim, timesteps_emb_dim=width
        )
        for layer in net.attn_processors
    }
    net.set_attn_processor(processors)
    net.image_proj = IPAdapterTimeImageProjection(
        WIDTH, width, WIDTH, depth=1, dim_head=8, heads=2, num_queries=4, timestep_in_dim=width
    )
    call = {"ip_adapter_image_embeds": torch.randn(2, 3, WIDTH)}
    assert not torch.allclose(one.latents(**call), one.latents(), atol=1e-2)
    is_cfg(one, name, **call)
    assert len(inputs_of(one, name, [0], **call)) == 1


@pytest.mark.parametrize("name", covered("LoRA"))
def test_a_lora(name: str) -> None:
    one = build(name)
    load_lora(one, name)
    assert not torch.allclose(one.latents(), plain(name), atol=1e-2)
    is_cfg(one, name)


@pytest.mark.parametrize("name", covered("LoRA from a callback"))
def test_a_lora_that_a_callback_loads_and_turns_down(name: str) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        if step == 0:
            load_lora(one, name)
        if step == 1:
            (adapter,) = pipe.get_active_adapters()
            pipe.set_adapters(adapter, 0.5)
        return tensors

    call: dict[str, Any] = {"callback_on_step_end": change, "num_inference_steps": 4}
    one = build(name)
    cfg = one.latents(**call)
    one = build(name)
    torch.testing.assert_close(drawn(one, ALL, name, **call), cfg, rtol=1e-5, atol=1e-5)
    one = build(name)
    assert len(inputs_of(one, name, [1, 2], **call)) == 2


@pytest.mark.parametrize("name", covered("CFG cutoff"))
def test_no_refresh_after_the_official_cutoff(name: str) -> None:
    one = build(name)
    kind: Any = {"SD": SDCFGCutoffCallback, "SD3": SD3CFGCutoffCallback}.get(PIPELINES[name].family)
    if kind is None:
        images = "image" in one.pipe._callback_tensor_inputs
        kind = SDXLControlnetCFGCutoffCallback if images else SDXLCFGCutoffCallback
    cut = kind(cutoff_step_ratio=None, cutoff_step_index=0)
    call: dict[str, Any] = longer(name)
    with guide(name).attached(one.pipe, refresh=ALL), one.batches() as sizes:
        found = one.latents(callback_on_step_end=cut, **call)
        assert sizes == [BOTH] + [2] * (len(sizes) - 1)
        assert torch.equal(found, one.latents(callback_on_step_end=once(_stop), **call))


def _stop(pipe: Any) -> None:
    pipe._guidance_scale = 0.0


@pytest.mark.parametrize("name", covered("dynamic CFG"))
def test_no_refresh_after_a_callback_that_halves_the_batch(name: str) -> None:
    one = build(name)
    names = [n for n in ("prompt_embeds", "pooled_prompt_embeds")
             if n in one.pipe._callback_tensor_inputs]  # fmt: skip

    def halve(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        if step == 0:
            tensors |= {n: tensors[n].chunk(2)[-1] for n in names}
            pipe._guidance_scale = 0.0
        return tensors

    inputs: dict[str, Any] = {"callback_on_step_end_tensor_inputs": names} | longer(name)
    with guide(name).attached(one.pipe, refresh=ALL), one.batches() as sizes:
        found = one.latents(callback_on_step_end=halve, **inputs)
        assert sizes == [BOTH] + [2] * (len(sizes) - 1)
        assert torch.equal(found, one.latents(callback_on_step_end=stop, **longer(name)))


def test_a_prompt_that_is_longer_than_the_negative_prompt() -> None:
    """CogView4 masks no text; in one batch of two lengths the padding does not count."""
    one = build("CogView4")
    call: dict[str, Any] = {"prompt": ["cat " * 20, "a bee"]}
    expected = one.latents(**call)
    is_cfg(one, "CogView4", **call)
    assert torch.equal(one.latents(**call), expected)
    with guide("CogView4", trained=False).attached(one.pipe):
        assert torch.equal(one.latents(**call), one.latents(guidance_scale=1.0, **call))


def test_a_processor_that_takes_no_mask_is_refused_where_there_are_two_lengths() -> None:
    class Other(CogView4AttnProcessor):  # type: ignore[misc]
        """Of somebody else."""

    one = build("CogView4")
    one.denoiser.transformer_blocks[1].attn1.set_processor(Other())
    with guide("CogView4").attached(one.pipe, refresh=1):
        one.latents()
        with pytest.raises(GuideError, match="the attention processor Other cannot take in one b"):
            one.latents(prompt=["cat " * 20, "a bee"])


def replaced(one: Pipeline, name: str) -> dict[str, torch.Tensor]:
    """Other conditions for both halves, as a callback gives them."""
    made = encode(one, ["dog", "a"], negative_prompt=NEGATIVE)
    both = {"prompt_embeds": torch.cat([made[1], made[0]])}
    if len(made) == 4:
        pooled = "pooled_prompt_embeds" if PIPELINES[name].family == "SD3" else "add_text_embeds"
        both[pooled] = torch.cat([made[3], made[2]])
    return both


@pytest.mark.parametrize("name", covered("conditions from a callback"))
def test_other_prompts_from_a_callback_forget_what_was_found(name: str) -> None:
    one = build(name)
    both = replaced(one, name)
    call: dict[str, Any] = {"num_inference_steps": 4}

    def change(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        return dict(both) if step == 1 else {}

    seen = inputs_of(one, name, [0], callback_on_step_end=change, **call)
    assert [inputs.refresh is not None for inputs in seen] == [True, False, False]
    # a refresh after that is one of the prompts that hold then
    is_cfg(one, name, callback_on_step_end=change, **call)


CALLBACKS: dict[str, Callable[[Tensors], Tensors]] = {
    "returns nothing": lambda tensors: {},
    "returns all": lambda tensors: tensors,
    "returns the latents": lambda tensors: {"latents": tensors["latents"].clone()},
}


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize("name", ["SD", "SDXL", "SD3"])
def test_a_callback_that_leaves_the_prompts_keeps_what_was_found(name: str, kind: str) -> None:
    one = build(name)

    def look(pipe: Any, step: int, timestep: Any, tensors: Tensors) -> Tensors:
        return CALLBACKS[kind](tensors)

    known = one.pipe._callback_tensor_inputs
    inputs = [n for n in known if n in ("latents", "prompt_embeds", "negative_prompt_embeds")]
    seen = inputs_of(
        one, name, [0], num_inference_steps=4, callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=inputs,
    )  # fmt: skip
    assert [inputs.refresh is not None for inputs in seen] == [True] * 3


@pytest.mark.parametrize("name", covered("w ≤ 1"))
def test_without_guidance_no_step_is_refreshed(name: str) -> None:
    one = build(name)
    with guide(name).attached(one.pipe, refresh=ALL), one.batches() as sizes:
        assert torch.equal(one.latents(guidance_scale=1.0), plain(name, 1.0))
        assert torch.equal(one.latents(guidance_scale=0.0), plain(name, 1.0))
    assert set(sizes) == {2}
