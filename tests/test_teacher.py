"""Teacher and student."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pilotfish.conditioning import NULL, PromptTable, some_or_one
from pilotfish.guides import FullGuide, Guide
from pilotfish.interface import TextConditions
from pilotfish.teacher import (
    Student,
    Teacher,
    checkpoint_in_pass,
    checksum,
)


@pytest.fixture
def prompts() -> PromptTable:
    """Three, and the null prompt."""
    generator = torch.Generator().manual_seed(8)
    return PromptTable(TextConditions(torch.randn(4, 8, 16, generator=generator)))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    return z, torch.tensor([800, 200]), torch.tensor([2, 0])


def test_the_teacher_makes_both_predictions_in_one_call(
    unet: UNet2DConditionModel, prompts: PromptTable, batch: Any, batches: Callable[..., Any]
) -> None:
    z, t, prompt = batch
    with batches(unet) as sizes:
        teacher = Teacher(unet, prompts)
        unconditional, conditional = teacher(z, t, prompt, torch.tensor([NULL, 1]))
    assert sizes == [4]
    with torch.no_grad():
        n = unet(z, t, prompts(torch.tensor([NULL, 1])).hidden_states).sample
        c = unet(z, t, prompts(prompt).hidden_states).sample
    torch.testing.assert_close(unconditional, n)
    torch.testing.assert_close(conditional, c)


def test_the_teacher_is_frozen(unet: UNet2DConditionModel, prompts: PromptTable) -> None:
    Teacher(unet.train(), prompts)
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())


def test_a_fresh_student_is_the_conditional_model(
    fresh: Guide, unet: UNet2DConditionModel, prompts: PromptTable, batch: Any
) -> None:
    z, t, prompt = batch
    student = Student(fresh, unet)
    with torch.no_grad():
        guided = student(z, t, prompts(prompt), prompts.null, torch.tensor([3.0, 7.5]))
        plain = unet(z, t, prompts(prompt).hidden_states).sample
    assert torch.equal(guided, plain)


def test_scale_one_is_the_conditional_model_and_others_are_not(
    trained: Guide, unet: UNet2DConditionModel, prompts: PromptTable, batch: Any
) -> None:
    z, t, prompt = batch
    student = Student(trained, unet)
    with torch.no_grad():
        guided = student(z, t, prompts(prompt), prompts.null, torch.tensor([1.0, 4.0]))
        plain = unet(z, t, prompts(prompt).hidden_states).sample
    assert torch.equal(guided[0], plain[0])
    assert not torch.allclose(guided[1], plain[1])


def test_gradient_checkpointing_changes_no_gradient(
    trained: Guide, unet: UNet2DConditionModel, prompts: PromptTable, batch: Any
) -> None:
    """It runs parts of the pass again when the guided pass is long over, in whichever thread."""
    z, t, prompt = batch
    student = Student(trained, unet.requires_grad_(False))

    def gradients() -> list[torch.Tensor]:
        trained.zero_grad()
        made = student(z, t, prompts(prompt), prompts.null, torch.tensor([3.0, 7.5]))
        backward = threading.Thread(target=made.pow(2).mean().backward)
        backward.start()
        backward.join()
        return [p.grad.clone() for p in trained.parameters() if p.grad is not None]

    plain = gradients()
    unet.enable_gradient_checkpointing(checkpoint_in_pass)
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_every_sample_has_its_own_scale(
    trained: Guide, unet: UNet2DConditionModel, prompts: PromptTable, batch: Any
) -> None:
    z, t, prompt = batch
    student = Student(trained, unet)
    with torch.no_grad():
        together = student(z, t, prompts(prompt), prompts.null, torch.tensor([2.5, 2.75]))
        for i, w in enumerate((2.5, 2.75)):
            one = slice(i, i + 1)
            alone = student(z[one], t[one], prompts(prompt[one]), prompts.null, torch.tensor([w]))
            torch.testing.assert_close(together[one], alone)
        other = student(z, t, prompts(prompt), prompts.null, torch.tensor([2.75, 2.75]))
    assert not torch.allclose(together[0], other[0], rtol=0, atol=1e-7)


def test_every_sample_has_its_own_negative_prompt(
    trained: Guide, unet: UNet2DConditionModel, prompts: PromptTable, batch: Any
) -> None:
    z, t, prompt = batch
    scale = torch.tensor([3.0, 7.5])
    student = Student(trained, unet)
    negative = torch.tensor([NULL, 1])
    with torch.no_grad():
        together = student(z, t, prompts(prompt), some_or_one(prompts, negative), scale)
        for i, text in enumerate((prompts.null, prompts(torch.tensor([1])))):
            one = slice(i, i + 1)
            alone = student(z[one], t[one], prompts(prompt[one]), text, scale[one])
            torch.testing.assert_close(together[one], alone)
        plain = student(z, t, prompts(prompt), prompts.null, scale)
    # the paper's full guide is a copy of the encoder, which knows of no negative prompt
    ignored = torch.allclose(together[1], plain[1], rtol=0, atol=1e-7)
    assert ignored == isinstance(trained, FullGuide)
    assert len(some_or_one(prompts, torch.full((2,), NULL))) == 1


def test_only_the_guide_is_trained(
    fresh: Guide, unet: UNet2DConditionModel, prompts: PromptTable, batch: Any
) -> None:
    z, t, prompt = batch
    Teacher(unet, prompts)
    before = checksum(unet)
    student = Student(fresh, unet)
    assert {id(p) for p in student.parameters()} == {id(p) for p in fresh.parameters()}
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    student(z, t, prompts(prompt), prompts.null, torch.tensor([3.0, 7.5])).pow(2).mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in fresh.parameters())
    optimizer.step()
    assert checksum(unet) == before


def test_the_checksum_sees_one_changed_bit(unet: UNet2DConditionModel) -> None:
    before = checksum(unet)
    with torch.no_grad():
        weight = unet.conv_out.bias
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert checksum(unet) != before
