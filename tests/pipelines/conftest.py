"""Fixtures of the pipelines' tests."""

from __future__ import annotations

import pytest
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


@pytest.fixture
def encoded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is encoded without noise. Pipelines of SD3 encode a control image twice for CFG,
    each time with noise of its own."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
