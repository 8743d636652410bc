"""Equation (1), the rules of other teachers, the draw of w and its embedding."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.guidance import (
    classifier_free_guidance,
    draw_guidance_scales,
    fourier_features,
    guidance_strength,
    per_sample,
    renormalised_guidance,
    rescaled_guidance,
)

scales = st.floats(0, 20)


def predictions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, c = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    return n, c


def test_scale_zero_is_the_unconditional_prediction() -> None:
    n, c = predictions()
    assert torch.equal(classifier_free_guidance(n, c, 0.0), n)


RULES = [
    classifier_free_guidance,
    partial(renormalised_guidance, dim=1),
    partial(rescaled_guidance, rescale=0.7),
]


@pytest.mark.parametrize("rule", RULES, ids=["plain", "renormalised", "rescaled"])
def test_each_rule_at_scale_one_is_the_conditional_prediction(rule: Any) -> None:
    n, c = predictions()
    torch.testing.assert_close(rule(n, c, 1.0), c)
    w = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(rule(n, c, w)[:2], c[:2])
    torch.testing.assert_close(rule(n, c, w)[2:], rule(n[2:], c[2:], 4.0))


@given(st.floats(1, 20), st.sampled_from([-1, 1]))
def test_renormalised_guidance_keeps_the_conditional_norm(w: float, dim: int) -> None:
    n, c = predictions()
    guided = renormalised_guidance(n, c, w, dim)
    torch.testing.assert_close(guided.norm(dim=dim), c.norm(dim=dim))
    plain = classifier_free_guidance(n, c, w)
    cosine = torch.nn.functional.cosine_similarity(guided, plain, dim)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@given(st.floats(1, 20), st.floats(0, 1))
def test_rescaled_guidance_mixes_two_standard_deviations(w: float, rescale: float) -> None:
    n, c = predictions()
    plain = classifier_free_guidance(n, c, w)
    assert torch.equal(rescaled_guidance(n, c, w, 0.0), plain)
    dims = (1, 2, 3)
    torch.testing.assert_close(rescaled_guidance(n, c, w, 1.0).std(dims), c.std(dims))
    between = (1 - rescale) * plain.std(dims) + rescale * c.std(dims)
    torch.testing.assert_close(rescaled_guidance(n, c, w, rescale).std(dims), between)


def test_rescaled_guidance_equals_that_of_diffusers() -> None:
    n, c = predictions()
    plain = classifier_free_guidance(n, c, 5.0)
    torch.testing.assert_close(rescaled_guidance(n, c, 5.0, 0.7), rescale_noise_cfg(plain, c, 0.7))


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
def test_fourier_features_of_close_scales_differ(w: float, apart: float) -> None:
    pair = fourier_features(torch.tensor([w, w + apart]), 16, longest=32.0)
    assert pair.shape == (2, 16)
    assert (pair[0] - pair[1]).abs().max() > 1e-3
    assert pair.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(pair.pow(2).sum(1), torch.full((2,), 8.0))


def test_the_lowest_frequency_has_the_longest_period() -> None:
    one = fourier_features(torch.tensor([3.0]), 16, longest=32.0)
    later = fourier_features(torch.tensor([35.0]), 16, longest=32.0)
    torch.testing.assert_close(one[0, [0, 8]], later[0, [0, 8]])


def test_strength_is_zero_up_to_one_and_linear_above() -> None:
    w = torch.tensor([-2.0, 0.0, 0.9, 1.0, 1.5, 8.0])
    torch.testing.assert_close(guidance_strength(w), torch.tensor([0.0, 0, 0, 0, 0.5, 7]))
