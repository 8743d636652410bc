"""What holds on every pipeline: one pass, the plain model, and CFG untouched."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch

from pilotfish.backbones.z_image_dit import as_conditions, as_list
from pilotfish.interface import TextConditions
from tests import editing
from tests.pipelines import specs
from tests.pipelines.matrix import covered, family
from tests.pipelines.pipelines import PROMPTS, Pipeline, build, guide, guided, plain, twin
from tests.pipelines.test_conditions import load_lora, unload_lora

NEGATIVE = ["red", "blue"]
SEQUENTIAL = {"Lumina2", *family("Wan", "Chroma", "CogView4", "Qwen", "Flux2Klein")}
"""Pipelines whose CFG makes two calls, which may have two lengths of text."""


@pytest.mark.parametrize("name", covered("one pass"))
def test_one_pass_a_step(name: str) -> None:
    one = build(name)
    with one.batches() as cfg:
        one.latents()
    with guide(name).attached(one.pipe), one.batches() as sizes, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert len(one.latents()) == 2
        steps = sum(cfg) // 4
        assert sizes == [2] * steps
        sizes.clear()
        assert len(one.latents(PROMPTS[0])) == 1
    assert sizes == [1] * steps
    assert set(cfg) == ({2} if name in SEQUENTIAL else {4})


@pytest.mark.parametrize("name", covered("fresh"))
def test_a_fresh_guide_is_the_conditional_model(name: str) -> None:
    one = build(name)
    with guide(name, trained=False).attached(one.pipe):
        assert torch.equal(one.latents(), plain(name, 1.0))


@pytest.mark.parametrize("name", covered("w ≤ 1"))
def test_up_to_one_a_guide_changes_nothing(name: str) -> None:
    one = build(name)
    with guide(name).attached(one.pipe):
        assert torch.equal(one.latents(guidance_scale=1.0), plain(name, 1.0))
        assert torch.equal(one.latents(guidance_scale=0.0), plain(name, 1.0))
    assert not torch.allclose(guided(name), plain(name, 1.0))


@pytest.mark.parametrize("name", covered("detach"))
def test_detaching_restores_cfg(name: str) -> None:
    one = build(name)
    before = type(one.pipe), set(vars(one.pipe)), one.hooks()
    with guide(name).attached(one.pipe):
        assert not torch.allclose(one.latents(), plain(name))
    assert torch.equal(one.latents(), plain(name))
    assert (type(one.pipe), set(vars(one.pipe)) & before[1], one.hooks()) == before


@pytest.mark.parametrize("name", covered("shared denoiser"))
def test_a_plain_pipeline_on_the_denoiser_does_cfg(name: str) -> None:
    one = build(name)
    other = twin(one)
    with guide(name).attached(one.pipe):
        assert torch.equal(other.latents(), plain(name))


def negatives(one: Pipeline, name: str, **call: Any) -> list[TextConditions]:
    """The negative prompts that a guide is given in a call."""
    seen: list[TextConditions] = []
    used = guide(name, trained=False)
    used.register_forward_pre_hook(lambda _, args: seen.append(args[0].negative))
    with used.attached(one.pipe):
        one.latents(**call)
    return seen


@torch.no_grad()
def encode(one: Pipeline, prompt: list[str], **call: Any) -> tuple[torch.Tensor, ...]:
    """What the plain pipeline makes of prompts, with classifier-free guidance: the prompts'
    tensors and the negative prompts' take turns."""
    if "Qwen" in type(one.pipe).__name__:  # embeddings and mask, the negative prompt by itself
        negative = call.pop("negative_prompt", [" "] * len(prompt))
        if "image" in one.images:
            call["image"] = editing.resized(one.pipe, one.images["image"])
        both = [one.pipe.encode_prompt(list(texts), **call) for texts in (prompt, negative)]
        return tuple(part for pair in zip(*both, strict=True) for part in pair if part is not None)
    if "Klein" in type(one.pipe).__name__:
        negative = call.pop("negative_prompt", [""] * len(prompt))
        return one.encoded(list(prompt), **call), one.encoded(negative, **call)
    if "ZImage" in type(one.pipe).__name__:  # lists, which the call repeats
        times = call.pop("num_images_per_prompt", 1)
        length = {"max_sequence_length": one.call["max_sequence_length"]}
        listed = one.pipe.encode_prompt(list(prompt), **length, **copy.deepcopy(call))
        p, n = (as_conditions([t for t in texts for _ in range(times)]) for texts in listed)
        assert p.mask is not None
        assert n.mask is not None
        return p.embeds, n.embeds, p.mask, n.mask
    video = type(one.pipe).__name__.startswith(("Wan", "LTX"))
    images = {} if video else {"num_images_per_prompt": 1}
    given = {"do_classifier_free_guidance": True} | images | call
    if "Diffusion3" in type(one.pipe).__name__:
        given |= {"prompt_2": None, "prompt_3": None}
    own = (
        "max_sequence_length", "clean_caption", "complex_human_instruction", "system_prompt",
    )  # fmt: skip
    known = inspect.signature(one.pipe.encode_prompt).parameters
    encoder = {k: one.call[k] for k in own if k in one.call and k in known}
    made = one.pipe.encode_prompt(prompt=prompt, device="cpu", **(encoder | given))
    if "AuraFlow" in type(one.pipe).__name__:  # has applied its masks
        made = (made[0], made[2])
    elif "Chroma" in type(one.pipe).__name__:  # which returns positions as well
        made = (made[0], made[3], made[2], made[5])
    elif masked(one):  # prompt, mask, negative, mask
        made = (made[0], made[2], made[1], made[3])
    return tuple(made)


def masked(one: Pipeline) -> bool:
    """Whether the text of a pipeline has a mask."""
    return any(name in type(one.pipe).__name__ for name in specs.MASKED)


def parts(text: TextConditions) -> list[torch.Tensor]:
    return [t for t in (text.embeds, text.pooled, text.mask) if t is not None]


def shows(seen: list[TextConditions], expected: tuple[torch.Tensor, ...]) -> None:
    """Every step of a call was given these negative prompts."""
    assert seen
    for text in seen:
        assert len(parts(text)) == len(expected) // 2
        for part, other in zip(parts(text), expected[1::2], strict=True):
            torch.testing.assert_close(part.expand_as(other), other)


@pytest.mark.parametrize("name", covered("negative_prompt"))
def test_the_negative_prompt_reaches_the_guide(name: str) -> None:
    one = build(name)
    seen = negatives(one, name, negative_prompt=NEGATIVE)
    assert len(seen[0]) == 2
    shows(seen, encode(one, list(PROMPTS), negative_prompt=NEGATIVE))


@pytest.mark.parametrize("name", covered("no negative prompt"))
def test_without_a_negative_prompt_the_guide_is_given_that_of_cfg(name: str) -> None:
    one = build(name)
    seen = negatives(one, name)
    # one serves all, where it is not encoded with images
    assert len(seen[0]) == (len(PROMPTS) if name == "Qwen-Image edit" else 1)
    shows(seen, encode(one, list(PROMPTS)))
    if specs.PIPELINES[name].family == "SDXL":
        assert one.pipe.config.force_zeros_for_empty_prompt
        assert not seen[0].embeds.any()


def test_no_guidance_without_a_negative_prompt_where_the_pipeline_has_none() -> None:
    one = build("Qwen-Image")
    conditional = one.latents(negative_prompt=None)
    with (
        guide("Qwen-Image").attached(one.pipe),
        pytest.warns(UserWarning, match="no classifier-free guidance without a negative_prompt"),
    ):
        assert torch.equal(one.latents(negative_prompt=None), conditional)
    assert torch.equal(conditional, plain("Qwen-Image", 1.0))


@pytest.mark.parametrize("name", ["Sana", "Wan", "Lumina2", "Qwen-Image"])
def test_the_text_encoder_may_be_of_another_precision(name: str) -> None:
    """Where the pipeline casts what it makes on the way to the denoiser."""
    one = build(name, alone=True)
    one.denoiser.to(torch.bfloat16)
    if name not in ("Sana", "Wan"):
        one.pipe.to(torch.bfloat16)
    assert one.latents().isfinite().all()
    with guide(name).attached(one.pipe, refresh=[1]):
        assert one.latents().isfinite().all()


def test_a_replaced_encode_prompt_encodes_a_separate_negative_prompt() -> None:
    one = build("Qwen-Image")
    plain_encode = one.pipe.encode_prompt
    one.pipe.encode_prompt = lambda *given, **more: plain_encode(*given, **more)
    with guide("Qwen-Image").attached(one.pipe):
        assert torch.equal(one.latents(), guided("Qwen-Image"))


@pytest.mark.parametrize("name", covered("negative prompt of another length"))
def test_the_negative_prompt_may_have_another_length(name: str) -> None:
    """Two passes in one batch could not take it."""
    one = build(name)
    encode_prompt = one.pipe.encode_prompt

    def shorter(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        made = encode_prompt(*args, **kwargs)
        if masked(one):
            half = len(made) // 2
            return (*made[:half], *(None if x is None else x[:, :5] for x in made[half:]))
        return (made[0], None if made[1] is None else made[1][:, :5], *made[2:])

    one.pipe.encode_prompt = shorter
    seen = negatives(one, name, negative_prompt=NEGATIVE)
    assert {text.embeds.shape[1] for text in seen} == {5}
    with guide(name).attached(one.pipe):
        one.latents(negative_prompt=NEGATIVE)
    assert one.pipe.encode_prompt is shorter
    if name not in SEQUENTIAL:
        with pytest.raises(RuntimeError):
            one.latents(negative_prompt=NEGATIVE)


@pytest.mark.parametrize("name", covered("num_images_per_prompt"))
def test_several_images_of_a_prompt(name: str) -> None:
    one = build(name)
    call: dict[str, Any] = {"num_images_per_prompt": 2}
    with one.batches() as sizes:
        conditional = one.latents(guidance_scale=1.0, negative_prompt=NEGATIVE, **call)
        seen: list[TextConditions] = []
        used = guide(name, trained=False)
        used.register_forward_pre_hook(lambda _, args: seen.append(args[0].negative))
        with used.attached(one.pipe):
            assert torch.equal(one.latents(negative_prompt=NEGATIVE, **call), conditional)
    assert set(sizes) == {4}
    shows(seen, encode(one, list(PROMPTS), negative_prompt=NEGATIVE, **call))


def given_embeddings(one: Pipeline, name: str) -> dict[str, torch.Tensor]:
    """Prompt and negative prompt as arguments of a call."""
    made: tuple[Any, ...] = encode(one, list(PROMPTS), negative_prompt=NEGATIVE)
    if "ZImage" in type(one.pipe).__name__:
        embeds, negative, mask, negative_mask = made
        made = (as_list(TextConditions(embeds, mask=mask)),
                as_list(TextConditions(negative, mask=negative_mask)))  # fmt: skip
    names = ["prompt_embeds", "negative_prompt_embeds"]
    if "AuraFlow" in type(one.pipe).__name__:
        made += tuple(torch.ones_like(embeds[..., 0]) for embeds in made)
    if masked(one):
        names += ["prompt_attention_mask", "negative_prompt_attention_mask"]
    elif "Qwen" in type(one.pipe).__name__:
        names += ["prompt_embeds_mask", "negative_prompt_embeds_mask"]
    else:
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    return dict(zip(names, made, strict=False))


@pytest.mark.parametrize("name", covered("prompt_embeds"))
def test_embeddings_are_as_good_as_prompts(name: str) -> None:
    one = build(name)
    given: dict[str, Any] = given_embeddings(one, name)
    if masked(one):
        given["negative_prompt"] = None
    with guide(name).attached(one.pipe):
        expected = one.latents(negative_prompt=NEGATIVE)
        assert torch.equal(one.latents(prompt=None, **given), expected)


@pytest.mark.parametrize("name", covered("prompt_embeds, other precision"))
def test_embeddings_may_be_of_another_precision_than_the_denoiser(name: str) -> None:
    one = build(name, alone=True)
    given: dict[str, Any] = given_embeddings(one, name)
    if masked(one):
        given["negative_prompt"] = None
    halves = {
        k: v.bfloat16() if v is not None and v.is_floating_point() else v for k, v in given.items()
    }
    one.pipe.to(torch.bfloat16)
    with guide(name).attached(one.pipe):
        found = one.latents(prompt=None, **given)
        torch.testing.assert_close(found, one.latents(prompt=None, **halves))


@pytest.mark.parametrize("name", covered("shared and guided"))
def test_each_of_two_guided_pipelines_on_a_denoiser_is_on_its_own(name: str) -> None:
    one = build(name)
    two, used = twin(one), guide(name)

    def without(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            used.detach(two.pipe)
        return tensors

    with used.attached(one.pipe):
        load_lora(one, name)
        expected = one.latents()
        unload_lora(one)
        used.attach(two.pipe)
        load_lora(two, name)  # of which the other pipeline learns by itself
        found = one.latents(callback_on_step_end=without)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        unload_lora(one)
        torch.testing.assert_close(one.latents(), guided(name), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(expected, guided(name), atol=1e-2)


@pytest.mark.parametrize("name", covered("clip_skip"))
def test_layers_of_the_text_encoder_are_skipped(name: str) -> None:
    one = build(name)
    conditional = one.latents(guidance_scale=1.0, clip_skip=1)
    assert not torch.equal(conditional, plain(name, 1.0))
    with guide(name, trained=False).attached(one.pipe):
        assert torch.equal(one.latents(clip_skip=1), conditional)
    seen = negatives(one, name, negative_prompt=NEGATIVE, clip_skip=1)
    shows(seen, encode(one, list(PROMPTS), negative_prompt=NEGATIVE, clip_skip=1))


@pytest.mark.parametrize("name", covered("encode_prompt replaced"))
def test_encode_prompt_may_be_replaced_on_the_object(name: str) -> None:
    """As is done to weight prompts; its arguments may have other names where the pipeline gives
    them by their places."""
    one = build(name)
    plain_encode = one.pipe.encode_prompt

    def weighted(*given: Any, **more: Any) -> tuple[Any, ...]:
        made = plain_encode(*given, **more)
        return (1.5 * made[0], *made[1:])

    one.pipe.encode_prompt = weighted
    conditional = one.latents(guidance_scale=1.0)
    cfg = one.latents()
    assert not torch.equal(cfg, plain(name))
    with guide(name, trained=False).attached(one.pipe):
        assert torch.equal(one.latents(), conditional)
    assert one.pipe.encode_prompt is weighted
    assert torch.equal(one.latents(), cfg)

    def without(*given: Any, **more: Any) -> tuple[Any, ...]:
        made = plain_encode(*given, **more)
        place = len(made) // 2 if masked(one) else 1
        return (*made[:place], None, *made[place + 1 :])

    one.pipe.encode_prompt = without
    hooks = one.hooks()
    kind = type(one.pipe).__name__
    with guide(name).attached(one.pipe):
        refused = f"^encode_prompt of this {kind} returned no negative prompt for 2 images, and"
        with pytest.raises(ValueError, match=refused):
            one.latents()
        one.pipe.encode_prompt = copy.copy(weighted)
        one.latents()
        del one.pipe.encode_prompt
        assert torch.equal(one.latents(), guided(name))
    assert one.hooks() == hooks
