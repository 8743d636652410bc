"""Teacher and student, on every family of denoisers and with every type of guide."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, LTXPipeline

from pilotfish.backbones import Backbone
from pilotfish.conditioning import NULL, PromptTable, some_or_one
from pilotfish.guidance import classifier_free_guidance, per_sample
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.teacher import Denoiser, Student, Teacher, checkpoint_in_pass, checksum
from tests import components

TIME = torch.tensor([0.8, 0.2])
PROMPT = torch.tensor([2, 0])
SCALE = torch.tensor([3.0, 7.5])


@pytest.fixture(params=["unet, external", "unet, full", *components.FAMILIES])
def student(request: pytest.FixtureRequest) -> Student:
    """With a trained guide: each type on a UNet, the tiny guide on each family."""
    name, _, kind = request.param.partition(", ")
    guide_class = Guide.registry[kind or "tiny"]
    settings = {} if kind else {"condition_on_negative": True, "rank": 4, "head": 4}
    family = components.FAMILIES[name]
    denoiser = family.denoiser().requires_grad_(False)
    torch.manual_seed(3)
    guide = guide_class.for_denoiser(denoiser, family.prediction_type, **settings)
    return Student(components.randomise(guide), denoiser)


@pytest.fixture
def denoiser(student: Student) -> Any:
    return student._base[0].backbone.denoiser


@pytest.fixture
def prompts(denoiser: Any) -> PromptTable:
    """Three, and the null prompt."""
    return PromptTable(components.FAMILIES[kind(denoiser)].text(4, seed=8))


def kind(denoiser: Any) -> str:
    """The name of its family in tests."""
    return {
        "unet": "unet", "cross-attention-dit": "pixart", "sana": "sana", "joint-dit": "sd3",
        "one-stream-dit": "lumina2", "video-dit": "wan", "qwen-dit": "qwen",
        "z-image-dit": "z-image", "aura-flow-dit": "aura-flow", "flux2-dit": "flux2",
        "ltx-dit": "ltx", "chroma-dit": "chroma", "cogview4-dit": "cogview4",
    }[Backbone.of(denoiser).family]  # fmt: skip


@pytest.fixture
def latents(request: pytest.FixtureRequest) -> torch.Tensor:
    if "student" in request.fixturenames:
        family = components.FAMILIES[kind(request.getfixturevalue("denoiser"))]
    elif "name" in request.fixturenames:
        family = components.FAMILIES[request.getfixturevalue("name")]
    else:
        family = request.getfixturevalue("family")
    return family.latents(2, seed=9)


@pytest.fixture
def plain(denoiser: Any, prompts: PromptTable, latents: torch.Tensor) -> torch.Tensor:
    """The prediction for the prompts."""
    with torch.no_grad():
        return Backbone.of(denoiser)(latents, TIME, prompts(PROMPT))


# -- teacher -----------------------------------------------------------------------------------


def test_the_teacher_predicts_both_in_one_call(
    family: components.Family, latents: torch.Tensor, batches: Callable[..., Any]
) -> None:
    denoiser, prompts = family.denoiser().train(), PromptTable(family.text(4, seed=8))
    teacher = Teacher(denoiser, prompts)
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    negative = torch.tensor([NULL, 1])
    with batches(denoiser) as sizes:
        unconditional, conditional = teacher(latents, TIME, PROMPT, negative)
    assert sizes == [4]
    with torch.no_grad():
        for made, index in ((unconditional, negative), (conditional, PROMPT)):
            alone = Denoiser(denoiser)(latents, TIME, prompts(index))
            torch.testing.assert_close(made, alone, atol=1e-5, rtol=1e-5)
    guided = teacher.guided(unconditional, conditional, SCALE)
    rule = Backbone.of(denoiser).guidance_rule
    assert torch.equal(guided, rule(unconditional, conditional, SCALE))
    is_plain = torch.equal(guided, classifier_free_guidance(unconditional, conditional, SCALE))
    renormalises = [components.FAMILIES[name] for name in ("lumina2", "qwen")]
    assert is_plain == (family not in renormalises)
    torch.testing.assert_close(teacher.guided(unconditional, conditional, 1.0), conditional)


def processors(denoiser: Any) -> list[Any]:
    """Of the attention layers; each compares by identity."""
    return [vars(m)["processor"] for m in denoiser.modules() if "processor" in vars(m)]


def test_a_teacher_leaves_the_attention_processors_as_they_were(
    family: components.Family, latents: torch.Tensor
) -> None:
    denoiser, prompts = family.denoiser(), PromptTable(family.text(4, seed=8))
    before = processors(denoiser)
    Teacher(denoiser, prompts)(latents, TIME, PROMPT, torch.tensor([NULL, 1]))
    assert processors(denoiser) == before


def test_processors_that_mask_are_replaced_when_nothing_needs_them() -> None:
    family = components.FAMILIES["cogview4"]
    denoiser, prompts = family.denoiser(), PromptTable(family.text(4, seed=8))
    before, latents = processors(denoiser), family.latents(2)
    teacher, rest = Teacher(denoiser, prompts), (TIME, PROMPT, torch.tensor([NULL, 1]))
    with pytest.raises(RuntimeError):
        teacher(latents[:, :1], *rest)
    assert processors(denoiser) == before
    student = Student(TinyGuide.for_denoiser(denoiser, "flow"), denoiser)
    student(latents, TIME, prompts(PROMPT), prompts.null, SCALE)
    masking = processors(denoiser)
    assert not {*masking} & {*before}
    teacher(latents, *rest)
    assert processors(denoiser) == masking  # a backward pass may run blocks again
    student.hooks.remove()
    assert processors(denoiser) == before


@pytest.mark.parametrize("name", components.FAMILIES)
def test_a_denoiser_is_called_as_diffusers_calls_it(name: str, latents: torch.Tensor) -> None:
    family = components.FAMILIES[name]
    module, text, t = family.denoiser(), family.text(2), torch.tensor([800, 200])
    with torch.no_grad():
        made = Denoiser(module)(latents, TIME, text)
        if name == "unet":
            expected = module(latents, t, text.embeds).sample
        elif name == "sd3":
            expected = module(latents, text.embeds, text.pooled, t).sample
        elif name == "lumina2":
            expected = -module(latents, 1 - t / 1000, text.embeds, text.mask).sample
        elif name == "qwen":
            tokens, shapes = latents.flatten(2).mT, [[(1, 8, 8)]] * 2
            made_of = module(tokens, text.embeds, text.mask, t / 1000, shapes).sample
            expected = made_of.mT.unflatten(2, (8, 8))
        elif name == "chroma":
            tokens, mask = latents.flatten(2).mT, torch.cat([text.mask, torch.ones(2, 64)], 1)
            places = torch.cartesian_prod(*map(torch.arange, (1, 8, 8)))
            made_of = module(
                tokens, text.embeds, t / 1000, places, torch.zeros(8, 3), mask
            ).sample  # fmt: skip
            expected = made_of.mT.unflatten(2, (8, 8))
        elif name == "cogview4":  # one by one: a mask of diffusers masks nothing
            sides, none = torch.full((1, 2), 64), torch.zeros(1, 2)
            expected = torch.cat([
                module(latents[i, None], text.embeds[i, None, :count], t[i, None], sides, sides,
                       none).sample
                for i, count in enumerate(text.mask.sum(1).tolist())
            ])  # fmt: skip
        elif name == "z-image":
            texts = [row[mask == 1] for row, mask in zip(text.embeds, text.mask, strict=True)]
            listed = module(list(latents[:, :, None]), 1 - t / 1000, texts, return_dict=False)[0]
            expected = -torch.cat(listed, 1).transpose(0, 1)
        elif name == "aura-flow":
            expected = module(latents, text.embeds, t / 1000).sample
        elif name == "flux2":
            klein = Flux2KleinPipeline
            tokens, image_ids = klein._pack_latents(latents), klein._prepare_latent_ids(latents)
            text_ids = klein._prepare_text_ids(text.embeds)
            packed = module(tokens, text.embeds, t / 1000, image_ids, text_ids).sample
            expected = torch.stack([row.mT.unflatten(1, (8, 8)) for row in packed])
        elif name == "ltx":
            packed = module(
                LTXPipeline._pack_latents(latents),
                text.embeds,
                t,
                text.mask,
                2,
                8,
                8,
                (8 / 25, 32, 32),
            ).sample
            expected = LTXPipeline._unpack_latents(packed, 2, 8, 8)
        elif name == "wan":
            expected = module(latents, t, text.embeds).sample
        elif name == "sana":
            expected = module(
                latents, text.embeds, t, encoder_attention_mask=text.mask
            ).sample  # fmt: skip
        else:
            expected = module(
                latents, encoder_hidden_states=text.embeds, timestep=t,
                encoder_attention_mask=text.mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample[:, :4]  # fmt: skip
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)


# -- student -----------------------------------------------------------------------------------


@torch.no_grad()
def test_scale_1_is_the_plain_prediction_and_others_are_not(
    student: Student, prompts: PromptTable, latents: torch.Tensor, plain: torch.Tensor
) -> None:
    made = student(latents, TIME, prompts(PROMPT), prompts.null, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(made[0], plain[0], rtol=0, atol=0)
    assert not torch.allclose(made[1], plain[1], atol=1e-5)


@torch.no_grad()
def test_each_sample_has_its_own_scale_and_negative_prompt(
    student: Student, prompts: PromptTable, latents: torch.Tensor
) -> None:
    negative, scale = torch.tensor([NULL, 1]), torch.tensor([2.5, 2.75])
    text = prompts(PROMPT)
    together = student(latents, TIME, text, some_or_one(prompts, negative), scale)
    for i in range(2):
        one = slice(i, i + 1)
        alone = student(latents[one], TIME[one], text[one], prompts(negative[one]), scale[one])
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-4)
    other = student(latents, TIME, text, prompts(negative), scale + 0.25)
    assert not torch.allclose(together[0], other[0], rtol=0, atol=1e-7)
    null = student(latents, TIME, text, prompts.null, scale)
    # the paper's full guide is a copy of the encoder, which has no input for a negative prompt
    ignored = torch.allclose(together[1], null[1], rtol=0, atol=1e-7)
    assert ignored == isinstance(student.guide, FullGuide)


def test_a_step_with_both_passes_knows_the_refresh_before(
    family: components.Family, latents: torch.Tensor
) -> None:
    """Of the two samples the first has had one."""
    denoiser, prompts = family.denoiser(), PromptTable(family.text(4, seed=8))
    guide = TinyGuide.for_denoiser(
        denoiser, family.prediction_type, rank=4, head=4, times=[0.8, 0.2]
    )
    student = Student(components.randomise(guide), denoiser)
    given = latents, TIME, prompts(PROMPT), prompts.null, SCALE
    before, due = components.refresh(latents), torch.tensor([True, True])
    with torch.no_grad():
        knowing, unknowing = (student(*given, found, due) for found in (before, None))
        second = student(*given, before, torch.tensor([False, True]))
    assert (knowing[0] - unknowing[0]).abs().max() > 1e-4
    torch.testing.assert_close(knowing[1], unknowing[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(knowing[1], second[1], atol=1e-4, rtol=1e-4)


def test_a_fresh_guide_adds_the_difference_of_the_last_refresh(
    family: components.Family, latents: torch.Tensor
) -> None:
    """In the sign and on the grid of the denoiser's own prediction."""
    denoiser, prompts = family.denoiser(), PromptTable(family.text(4, seed=8))
    guide = TinyGuide.for_denoiser(denoiser, family.prediction_type, rank=4, head=4)
    text, refresh = prompts(PROMPT), components.refresh(latents)
    with torch.no_grad():
        made = Student(guide, denoiser)(latents, TIME, text, prompts.null, SCALE, refresh)
        plain = Backbone.of(denoiser)(latents, TIME, text)
    added = per_sample(SCALE - 1, latents) * refresh.difference
    torch.testing.assert_close(made, plain + added, atol=1e-5, rtol=1e-4)
    assert refresh.difference[0].any()


def test_only_the_guide_is_trained(
    student: Student, denoiser: Any, prompts: PromptTable, latents: torch.Tensor
) -> None:
    before = checksum(denoiser)
    assert {id(p) for p in student.parameters()} == {id(p) for p in student.guide.parameters()}
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    made = student(latents, TIME, prompts(PROMPT), prompts.null, SCALE, components.refresh(latents))
    made.square().mean().backward()
    assert not [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    optimizer.step()
    assert checksum(denoiser) == before


def test_gradient_checkpointing_changes_no_gradient(
    student: Student, denoiser: Any, prompts: PromptTable, latents: torch.Tensor
) -> None:
    """Parts of the pass run again when it is closed, in whichever thread."""

    def gradients() -> list[torch.Tensor]:
        student.zero_grad()
        made = student(
            latents, TIME, prompts(PROMPT), prompts.null, SCALE, components.refresh(latents)
        )
        backward = threading.Thread(target=made.square().mean().backward)
        backward.start()
        backward.join()
        assert all(p.grad is not None for p in student.parameters())
        return [p.grad.clone() for p in student.parameters()]

    plain = gradients()
    denoiser.enable_gradient_checkpointing(checkpoint_in_pass)
    denoiser.train()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_guide_in_float32_trains_on_a_base_in_half_precision(
    family: components.Family, latents: torch.Tensor
) -> None:
    denoiser = family.denoiser().to(torch.bfloat16).requires_grad_(False)
    guide = TinyGuide.for_denoiser(denoiser, family.prediction_type, rank=4, head=4)
    student = Student(components.randomise(guide), denoiser)
    prompts = PromptTable(family.text(4, seed=8).to(torch.bfloat16))
    made = student(latents, TIME, prompts(PROMPT), prompts.null, SCALE)
    assert made.dtype == torch.bfloat16
    made.float().square().mean().backward()
    assert {p.grad.dtype for p in guide.parameters() if p.grad is not None} == {torch.float32}
    with torch.no_grad():
        base = Denoiser(denoiser)(latents, TIME, prompts(PROMPT))
        one = student(latents, TIME, prompts(PROMPT), prompts.null, torch.ones(2))
    # a matrix product in half precision rounds in another order for another layout of its input
    torch.testing.assert_close(one, base, atol=0.03, rtol=0.02)


def test_the_checksum_depends_on_every_bit(family: components.Family) -> None:
    denoiser = family.denoiser()
    before = checksum(denoiser)
    with torch.no_grad():
        weight = next(reversed(list(denoiser.parameters()))).view(-1)
        weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
    assert checksum(denoiser) != before
