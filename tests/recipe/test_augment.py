"""Restyled images, on which fine-tunes for augmentation are trained."""

from __future__ import annotations

import pytest
import torch

from recipe.augment import Restyle, contours, flat, lit


def square(value: float = -0.2) -> torch.Tensor:
    """(1, 3, 32, 32): a square on white."""
    image = torch.ones(1, 3, 32, 32)
    image[..., 8:24, 8:24] = value
    return image


@pytest.mark.parametrize("restyle", [contours, flat, lit])
def test_white_stays_white(restyle: Restyle) -> None:
    images = torch.ones(2, 3, 32, 32)
    images[0, :, 8:24, 8:24] = torch.tensor([0.6, -0.4, -0.7])[:, None, None]
    restyled = restyle(images)
    assert restyled.shape == images.shape
    assert restyled.abs().max() <= 1
    assert torch.equal(restyled[1], images[1])
    assert torch.equal(restyled[0, :, :4], images[0, :, :4])
    assert not torch.allclose(restyled[0], images[0], atol=0.1)


def test_flat_images_have_few_colours() -> None:
    assert len(flat(torch.rand(1, 3, 32, 32) * 2 - 1).unique()) <= 4


def test_light_is_from_the_upper_left() -> None:
    image = square()
    restyled = lit(image)
    assert restyled[..., 9, 9].mean() > image[..., 9, 9].mean() > restyled[..., 22, 22].mean()
