"""Hosts with pictures, and a result that needs no measuring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.result import (
    Agreement,
    Cost,
    GuideSize,
    HostResult,
    Interval,
    Result,
    Run,
    Scores,
)
from pilotfish.guidance_error import GuidanceError
from pilotfish.guides import Guide, TinyGuide


@pytest.fixture
def guide(pipe: Any) -> Guide:
    """A fresh tiny guide for the pipeline."""
    torch.manual_seed(3)
    return TinyGuide.for_denoiser(pipe.unet, "epsilon").eval()


@pytest.fixture
def moved(guide: Guide, randomise: Callable[[Guide], Guide]) -> Guide:
    """A guide that changes pictures."""
    return randomise(guide)


@pytest.fixture
def hosts(make_pipe: Callable[[], Any], real: Path) -> dict[str, Host]:
    return {"base": Host(make_pipe, real), "watercolour": Host(make_pipe)}


@pytest.fixture(scope="session")
def result() -> Result:
    """Round figures of two hosts; one has no reference for its Fréchet distance."""

    def host(shift: float, fd: float) -> HostResult:
        return HostResult(
            guidance_error=GuidanceError(
                0.3 + shift, {"2": 0.2 + shift, "7": 0.4 + shift}, {"0.999": 0.5, "0.499": 0.2}
            ),
            latent_mse_ratio=0.2 + shift,
            gain_kept=0.9 - shift,
            gain_kept_interval=Interval(0.8 - shift, 0.95 - shift),
            gain_kept_cosine=0.8,
            none=Scores(0.2, 0.4, 0.1, fd),
            cfg=Scores(0.6, 0.8, 0.3, fd / 2),
            guided=Scores(0.56, 0.75, 0.28, fd / 2),
            agreement={"guided": Agreement(24.0, 0.9, 0.95), "none": Agreement(15.0, 0.5, 0.6)},
        )

    return Result(
        hosts={"base": host(0.0, 40.0), "watercolour": host(0.1, float("nan"))},
        guide=GuideSize("tiny", 67_321, 0.0099),
        cost=Cost(
            cfg_over_guided={"1": 1.6, "8": 1.75},
            cfg_over_plain={"1": 1.8, "8": 1.9},
            flops={"plain": 1_000_000_000, "cfg": 2_000_000_000, "guided": 1_020_000_000},
            passes={"plain": 25.0, "cfg": 50.0, "guided": 25.0},
            seconds={"1": {"plain": 0.1, "cfg": 0.18, "guided": 0.11}},
        ),
        run=Run("pilotfish evaluate --seed 1", 1, 100, 4.0, 25, "a processor", {"torch": "2"}),
    )
