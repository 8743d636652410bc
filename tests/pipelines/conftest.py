"""Fixtures of the pipelines' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from tests.pipelines.pipelines import guided, plain


@pytest.fixture
def encoded_alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An image is encoded without noise. Pipelines of SD3 encode a control image twice for CFG,
    each time with noise of its own."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    for kept in (plain, guided):  # which are of images with noise
        kept.cache_clear()
    yield
    for kept in (plain, guided):
        kept.cache_clear()
