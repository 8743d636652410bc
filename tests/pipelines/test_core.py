"""What holds on every pipeline: one pass, the plain model, and CFG untouched."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from tests.pipelines import hosts
from tests.pipelines.hosts import PROMPTS
from tests.pipelines.matrix import pipelines
from tests.pipelines.test_conditions import lora


@pytest.mark.parametrize("name", pipelines("one pass"))
def test_one_pass_a_step(name: str) -> None:
    host = hosts.host(name)
    with host.batches() as cfg:
        host.draw()
    with hosts.guide(name).attached(host.pipe), host.batches() as guided, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(host.draw()) == 2
        assert guided == [2] * len(cfg)
        guided.clear()
        assert len(host.draw(hosts.PROMPTS[0])) == 1
    assert guided == [1] * len(cfg)
    assert cfg == [4] * len(cfg)


@pytest.mark.parametrize("name", pipelines("fresh"))
def test_a_fresh_guide_is_the_conditional_model(name: str) -> None:
    host = hosts.host(name)
    conditional = host.draw(guidance_scale=1.0)
    with hosts.guide(name, trained=False).attached(host.pipe):
        assert torch.equal(host.draw(), conditional)


@pytest.mark.parametrize("name", pipelines("w ≤ 1"))
def test_up_to_one_the_guide_is_not_asked(name: str) -> None:
    host = hosts.host(name)
    conditional = host.draw(guidance_scale=1.0)
    with hosts.guide(name).attached(host.pipe):
        assert torch.equal(host.draw(guidance_scale=1.0), conditional)
        assert torch.equal(host.draw(guidance_scale=0.0), conditional)
        assert not torch.allclose(host.draw(), conditional)


@pytest.mark.parametrize("name", pipelines("detach"))
def test_detaching_restores_cfg(name: str) -> None:
    host = hosts.host(name)
    before, cfg = type(host.pipe), host.draw()
    with hosts.guide(name).attached(host.pipe):
        assert not torch.allclose(host.draw(), cfg)
    assert type(host.pipe) is before
    assert torch.equal(host.draw(), cfg)


@pytest.mark.parametrize("name", pipelines("shared denoiser"))
def test_a_plain_pipeline_on_the_denoiser_does_cfg(name: str) -> None:
    host = hosts.host(name)
    other, cfg = hosts.sibling(host), host.draw()
    with hosts.guide(name).attached(host.pipe):
        host.draw()
        assert torch.equal(other.draw(), cfg)


def negatives_seen(host: hosts.Host, name: str, **call: Any) -> list[torch.Tensor]:
    """The negative prompts that a guide is shown in a call."""
    seen: list[torch.Tensor] = []
    guide = hosts.guide(name)
    guide.register_forward_pre_hook(lambda _, args: seen.append(args[0].negative_hidden_states))
    with guide.attached(host.pipe):
        host.draw(**call)
    return seen


def encode(host: hosts.Host, prompt: list[str], **call: Any) -> tuple[torch.Tensor, ...]:
    """What the plain pipeline makes of prompts."""
    given = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False} | call
    return host.pipe.encode_prompt(prompt=prompt, device="cpu", **given)


@pytest.mark.parametrize("name", pipelines("negative_prompt"))
def test_the_negative_prompt_reaches_the_guide(name: str) -> None:
    host = hosts.host(name)
    seen = negatives_seen(host, name, negative_prompt=["red", "blue"])
    expected = encode(host, ["red", "blue"])[0]
    assert seen
    for states in seen:
        torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("name", pipelines("no negative prompt"))
def test_without_a_negative_prompt_the_guide_sees_zeros(name: str) -> None:
    host = hosts.host(name)
    assert host.pipe.config.force_zeros_for_empty_prompt
    seen = negatives_seen(host, name)
    assert seen
    assert not any(states.any() for states in seen)


@pytest.mark.parametrize("name", pipelines("num_images_per_prompt"))
def test_several_pictures_of_a_prompt(name: str) -> None:
    host = hosts.host(name)
    asked = {"num_images_per_prompt": 2}
    conditional = host.draw(guidance_scale=1.0, **asked)
    with hosts.guide(name, trained=False).attached(host.pipe), host.batches() as sizes:
        assert torch.equal(host.draw(**asked), conditional)
    assert set(sizes) == {4}
    seen = negatives_seen(host, name, negative_prompt=["red", "blue"], **asked)
    torch.testing.assert_close(seen[0], encode(host, ["red", "blue"], **asked)[0])


@pytest.mark.parametrize("name", pipelines("prompt_embeds"))
def test_embeddings_are_as_good_as_prompts(name: str) -> None:
    host = hosts.host(name)
    made = encode(
        host, list(PROMPTS), do_classifier_free_guidance=True, negative_prompt=["red", "blue"]
    )
    which = ("prompt_embeds", "negative_prompt_embeds")
    pooled = tuple(w.replace("prompt", "pooled_prompt") for w in which)
    given = dict(zip((*which, *pooled), made, strict=False))
    with hosts.guide(name).attached(host.pipe):
        expected = host.draw(negative_prompt=["red", "blue"])
        assert torch.equal(host.draw(prompt=None, **given), expected)


@pytest.mark.parametrize("name", pipelines("prompt_embeds, other precision"))
def test_embeddings_may_be_of_another_precision_than_the_denoiser(name: str) -> None:
    host = hosts.host(name)
    cfg = {"do_classifier_free_guidance": True, "negative_prompt": ["red", "blue"]}
    made = encode(host, list(PROMPTS), **cfg)
    names = ("prompt_embeds", "negative_prompt_embeds",
             "pooled_prompt_embeds", "negative_pooled_prompt_embeds")  # fmt: skip
    given = dict(zip(names, made, strict=False))
    halves = {k: v.bfloat16() for k, v in given.items()}
    host.pipe.unet.to(torch.bfloat16)
    host.pipe.text_encoder = copy.deepcopy(host.pipe.text_encoder).to(torch.bfloat16)
    if hosts.KINDS[name].xl:
        host.pipe.text_encoder_2 = copy.deepcopy(host.pipe.text_encoder_2).to(torch.bfloat16)
    with hosts.guide(name).attached(host.pipe):
        found = host.draw(prompt=None, **given)
        torch.testing.assert_close(found, host.draw(prompt=None, **halves))


@pytest.mark.parametrize("name", pipelines("shared and guided"))
def test_each_of_two_guided_pipelines_on_a_denoiser_is_on_its_own(name: str) -> None:
    one, layers = hosts.host(name), lora(name)
    two, guide = hosts.sibling(one), hosts.guide(name)

    def without(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            guide.detach(two.pipe)
        return tensors

    with guide.attached(one.pipe):
        plain = one.draw()
        one.pipe.load_lora_weights(layers)
        expected = one.draw()
        one.pipe.unload_lora_weights()
        guide.attach(two.pipe)
        two.draw()
        two.pipe.load_lora_weights(layers)  # of which the other pipeline learns by itself
        found = one.draw(callback_on_step_end=without)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        one.pipe.unload_lora_weights()
        torch.testing.assert_close(one.draw(), plain, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(expected, plain, atol=1e-1)


@pytest.mark.parametrize("name", pipelines("clip_skip"))
def test_layers_of_the_text_encoder_are_skipped(name: str) -> None:
    host = hosts.host(name)
    conditional = host.draw(guidance_scale=1.0, clip_skip=1)
    assert not torch.equal(conditional, host.draw(guidance_scale=1.0))
    with hosts.guide(name, trained=False).attached(host.pipe):
        assert torch.equal(host.draw(clip_skip=1), conditional)
    seen = negatives_seen(host, name, negative_prompt=["red", "blue"], clip_skip=1)
    cfg = {"do_classifier_free_guidance": True, "negative_prompt": ["red", "blue"]}
    torch.testing.assert_close(seen[0], encode(host, list(PROMPTS), clip_skip=1, **cfg)[1])
