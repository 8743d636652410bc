"""Fixtures of the pipelines' tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def without_noise(self: DiagonalGaussianDistribution, *given: Any) -> torch.Tensor:
    """In place of ``DiagonalGaussianDistribution.sample``."""
    return self.mode()


@pytest.fixture
def encoded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is encoded without noise. Pipelines of SD3 encode a control image twice for CFG,
    each time with noise of its own."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", without_noise)
