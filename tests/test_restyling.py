"""The base's pictures redrawn, on which guides practise."""

from __future__ import annotations

import pytest
import torch

from recipe.augment import Restyle, draw_contours, draw_flat, draw_lit


@pytest.mark.parametrize("restyle", [draw_contours, draw_flat, draw_lit])
def test_a_picture_is_redrawn_and_white_stays_white(restyle: Restyle) -> None:
    pictures = torch.ones(2, 3, 32, 32)
    pictures[0, :, 8:24, 8:24] = torch.tensor([0.6, -0.4, -0.7])[:, None, None]
    drawn = restyle(pictures)
    assert drawn.shape == pictures.shape
    assert drawn.abs().max() <= 1
    assert torch.equal(drawn[1], pictures[1])
    assert torch.equal(drawn[0, :, :4], pictures[0, :, :4])
    assert not torch.allclose(drawn[0], pictures[0], atol=0.1)


def test_flat_pictures_have_few_colours() -> None:
    drawn = draw_flat(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert len(drawn.unique()) <= 4


def test_lumps_are_lit_from_the_upper_left() -> None:
    pictures = torch.ones(1, 3, 32, 32)
    pictures[..., 8:24, 8:24] = -0.2
    drawn = draw_lit(pictures)
    assert drawn[..., 9, 9].mean() > pictures[..., 9, 9].mean() > drawn[..., 22, 22].mean()
