"""Stress tests: small in the default run, at length with ``STRESS=1``.

At length they run on the bundled model, and write what they counted and measured into
``results/stress.json``. ``python -m tests.stress.page`` puts that into ``docs/stress.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pilotfish import bundled
from pilotfish.evaluation.results import machine, versions
from pilotfish.guides import Guide, TinyGuide
from tests.stress.page import LONG, RESULTS


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict[str, float]], None]:
    """A function that keeps the figures of a long test under a name."""

    def write(name: str, figures: dict[str, float]) -> None:
        if not LONG:
            return
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        where = request.node.nodeid.partition("[")[0]
        found[name] = {
            "figures": figures, "command": f"STRESS=1 python -m pytest {where}",
            "machine": machine(), "versions": versions(),
        }  # fmt: skip
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")

    return write


@pytest.fixture
def model(make_pipe: Callable[[str], Any]) -> Any:
    """A pipeline: a random one, or the bundled one."""
    return bundled.load_model() if LONG else make_pipe("epsilon")


@pytest.fixture
def guide(model: Any, randomise: Callable[[Guide], Guide]) -> Guide:
    """A trained tiny guide for it."""
    if LONG:
        return bundled.load_guide()
    torch.manual_seed(3)
    return randomise(TinyGuide.for_denoiser(model.unet, "epsilon"))
