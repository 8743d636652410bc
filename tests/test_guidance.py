"""Equation (1), the draw of w and its embedding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.guidance import (
    classifier_free_guidance,
    draw_guidance_scales,
    fourier_features,
    guidance_strength,
    per_sample,
)

scales = st.floats(0, 20)


def predictions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, c = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    return n, c


def test_scale_one_is_the_conditional_prediction() -> None:
    n, c = predictions()
    torch.testing.assert_close(classifier_free_guidance(n, c, 1.0), c)


def test_scale_zero_is_the_unconditional_prediction() -> None:
    n, c = predictions()
    assert torch.equal(classifier_free_guidance(n, c, 0.0), n)


@given(scales, scales)
def test_linear_in_the_scale(v: float, w: float) -> None:
    n, c = predictions()
    middle = classifier_free_guidance(n, c, (v + w) / 2)
    ends = classifier_free_guidance(n, c, v) + classifier_free_guidance(n, c, w)
    torch.testing.assert_close(middle, ends / 2)


@given(scales, st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_the_predictions(w: float, a: float, b: float) -> None:
    """So it holds for v prediction, which is linear in x and epsilon."""
    n1, c1 = predictions(1)
    n2, c2 = predictions(2)
    mixed = classifier_free_guidance(a * n1 + b * n2, a * c1 + b * c2, w)
    apart = a * classifier_free_guidance(n1, c1, w) + b * classifier_free_guidance(n2, c2, w)
    torch.testing.assert_close(mixed, apart)


def test_one_scale_for_each_sample() -> None:
    n, c = predictions()
    w = torch.tensor([1.0, 2.5, 7.0], dtype=torch.float64)
    together = classifier_free_guidance(n, c, w)
    for i, one in enumerate(w.tolist()):
        torch.testing.assert_close(together[i], classifier_free_guidance(n[i], c[i], one))


def test_per_sample_broadcasts_over_all_other_dimensions() -> None:
    like = torch.zeros(3, 4, 5, 6, dtype=torch.float16)
    value = per_sample(torch.tensor([1.0, 2.0, 3.0]), like)
    assert value.shape == (3, 1, 1, 1)
    assert value.dtype == torch.float16
    assert per_sample(2.0, like).ndim == 0


@given(st.integers(0, 2**31), st.floats(1, 5), st.floats(0, 10))
def test_scales_are_drawn_within_their_range(seed: int, low: float, width: float) -> None:
    w = draw_guidance_scales(64, low, low + width, torch.Generator().manual_seed(seed))
    assert w.shape == (64,)
    assert low - 1e-5 <= w.min()
    assert w.max() <= low + width + 1e-5


def test_scales_are_fractions_and_repeatable() -> None:
    first, second = (draw_guidance_scales(64, 1, 8, torch.Generator().manual_seed(0)) for _ in "ab")
    assert torch.equal(first, second)
    assert len(first.unique()) == 64
    assert not torch.equal(first, first.round())


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (3.0, 2.0), (float("nan"), 2.0)])
def test_a_wrong_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="1 <= low <= high"):
        draw_guidance_scales(4, low, high)


@given(st.floats(1, 15), st.floats(0.05, 1))
def test_fourier_features_tell_near_scales_apart(w: float, apart: float) -> None:
    pair = fourier_features(torch.tensor([w, w + apart]), 16, longest=32.0)
    assert pair.shape == (2, 16)
    assert (pair[0] - pair[1]).abs().max() > 1e-3
    assert pair.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(pair.pow(2).sum(1), torch.full((2,), 8.0))


def test_the_slowest_fourier_feature_has_the_longest_period() -> None:
    one = fourier_features(torch.tensor([3.0]), 16, longest=32.0)
    later = fourier_features(torch.tensor([35.0]), 16, longest=32.0)
    torch.testing.assert_close(one[0, [0, 8]], later[0, [0, 8]])


def test_strength_is_zero_up_to_one_and_linear_above() -> None:
    w = torch.tensor([-2.0, 0.0, 0.9, 1.0, 1.5, 8.0])
    torch.testing.assert_close(guidance_strength(w), torch.tensor([0.0, 0, 0, 0, 0.5, 7]))
