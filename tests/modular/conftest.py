"""Fixtures of the guider's tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest

from pilotfish.backbones import GuidedPass
from tests.pipelines.pipelines import guide

diffusers.utils.logging.set_verbosity_error()  # guiders warn that they are experimental


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a guide for a pipeline, trained or fresh."""

    @cache
    def save(name: str, trained: bool = True) -> Path:
        folder: Path = tmp_path_factory.mktemp("guide")
        guide(name, trained=trained).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def refreshes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of the denoiser call, among the guided ones, of every refresh."""
    found: list[int] = []
    refreshed = GuidedPass.refreshed

    def count(self: GuidedPass, *predictions: Any) -> Any:
        found.append(self._calls - 1)
        return refreshed(self, *predictions)

    monkeypatch.setattr(GuidedPass, "refreshed", count)
    return found
