"""The base's pictures redrawn, on which guides practise."""

from __future__ import annotations

import pytest
import torch

from recipe.augment import (
    Restyle,
    draw_bulged,
    draw_contours,
    draw_flat,
    draw_lit,
    draw_squashed,
    draw_waved,
)
from recipe.finetunes import exchanged

RESTYLES = [draw_contours, draw_flat, draw_lit, draw_bulged, draw_waved, draw_squashed]


@pytest.mark.parametrize("restyle", RESTYLES)
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


def test_a_lens_enlarges_waves_bend_and_the_squashed_are_narrower() -> None:
    pictures = torch.ones(1, 3, 32, 32)
    pictures[..., 8:24, 8:24] = -0.2

    def size(drawn: torch.Tensor) -> tuple[int, int]:
        dark = (drawn < 0.9).any(1)[0]
        return int(dark.any(0).sum()), int(dark.any(1).sum())

    wide, high = size(draw_bulged(pictures))
    assert min(wide, high) > 17
    narrow, _ = size(draw_squashed(pictures))
    assert narrow < size(draw_contours(pictures))[0]
    rows = (draw_waved(pictures) < 0.9).any(1)[0].float()
    edges = [int(row.argmax()) for row in rows if row.any()]
    assert max(edges) - min(edges) > 1  # the left edge is no straight line


def test_names_change_places_within_their_category() -> None:
    categories = ["a", "b"] * 10 + ["c"]
    places = exchanged(categories)
    assert sorted(places) == list(range(21))
    assert places != list(range(21))
    assert [categories[i] for i in places] == categories
