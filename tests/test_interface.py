"""Encoded prompts as a guide sees them."""

from __future__ import annotations

import pytest
import torch

from pilotfish.interface import TextConditions
from tests import components


@pytest.fixture
def text(family: components.Family) -> TextConditions:
    return family.text(3)


def assert_equal(one: TextConditions, other: TextConditions) -> None:
    for name in ("embeds", "pooled", "mask"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_parts_of_a_batch_make_it_up_again(text: TextConditions) -> None:
    assert len(text) == 3
    assert_equal(TextConditions.cat([text[:1], text[1:]]), text)
    assert_equal(text[torch.tensor([2, 0])][torch.tensor([1, 0])], text[::2])
    assert text.nbytes == sum(
        t.nbytes for t in (text.embeds, text.pooled, text.mask) if t is not None
    )


def test_one_prompt_serves_all_where_all_are_equal(text: TextConditions) -> None:
    assert_equal(text[:1].expand(4).one_if_equal(), text[:1])
    assert_equal(text.one_if_equal(), text)
    assert_equal(text.expand(3), text)
    if text.pooled is not None:
        other = TextConditions(text[:1].expand(3).embeds, text.pooled)
        assert len(other.one_if_equal()) == 3
    if text.mask is not None:
        other = TextConditions(text[:1].expand(3).embeds, mask=text.mask)
        assert len(other.one_if_equal()) == 3


def test_a_copy_shares_nothing(text: TextConditions) -> None:
    copy = text.clone()
    assert_equal(copy, text)
    copy.embeds.zero_()
    assert text.embeds.any()


def test_another_precision_keeps_the_mask(text: TextConditions) -> None:
    half = text.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.mask is text.mask
    assert half.pooled is None or half.pooled.dtype == torch.bfloat16


def test_prompts_of_several_lengths_are_padded_and_masked(family: components.Family) -> None:
    long, short = family.text(2, length=8), family.text(1, length=5)
    both = TextConditions.cat([long, short])
    assert both.embeds.shape[1] == 8
    assert both.mask is not None
    assert not both.mask[2, 5:].any()
    torch.testing.assert_close(both.mean()[2:], short.mean())
    torch.testing.assert_close(both.mean()[:2], long.mean())


def test_prompts_with_and_without_a_mask_are_all_masked() -> None:
    masked = components.FAMILIES["pixart"].text(2)
    both = TextConditions.cat([masked, TextConditions(masked.embeds)])
    assert both.mask is not None
    assert torch.equal(both.mask, torch.cat([masked.mask, torch.ones(2, 8)]))


def test_the_mean_is_over_the_tokens_that_count() -> None:
    embeds = torch.arange(6.0).reshape(1, 3, 2)
    assert TextConditions(embeds).mean().tolist() == [[2.0, 3.0]]
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert TextConditions(embeds, mask=mask).mean().tolist() == [[1.0, 2.0]]
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 5))  # as of a text encoder that is left out
    assert TextConditions(padded).mean().tolist() == [[2.0, 3.0]]
    assert TextConditions(torch.zeros(1, 3, 2)).mean().tolist() == [[0.0, 0.0]]
    nothing = TextConditions(embeds, mask=torch.zeros(1, 3))
    assert nothing.mean().tolist() == [[0.0, 0.0]]


def test_the_difference_is_by_token_or_to_the_mean(family: components.Family) -> None:
    text, same, short = (family.text(2, length=n, seed=s) for n, s in ((8, 1), (8, 2), (5, 3)))
    plain = TextConditions(text.embeds)
    assert torch.equal(plain.minus(same), text.embeds - same.embeds)
    torch.testing.assert_close(plain.minus(short), text.embeds - short.mean()[:, None])
    assert torch.equal(plain.minus(short[:1]), plain.minus(short[:1].expand(2)))
    if text.mask is not None:
        difference = text.minus(same)
        assert not difference[text.mask == 0].any()
        torch.testing.assert_close(difference[0, 0], text.embeds[0, 0] - same.mean()[0])
