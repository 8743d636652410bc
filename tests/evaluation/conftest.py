"""Models with reference images, and a result that needs no measuring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.evaluation.images import ModelSource
from pilotfish.evaluation.results import (
    Agreement,
    Cost,
    GuideSize,
    Interval,
    ModelResult,
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
    """A guide that changes images."""
    return randomise(guide)


@pytest.fixture
def models(make_pipe: Callable[[], Any], real: Path) -> dict[str, ModelSource]:
    def fine_tune() -> Any:
        pipe = make_pipe()
        with torch.no_grad():
            next(pipe.unet.parameters()).mul_(1.1)
        return pipe

    return {"base": ModelSource(make_pipe, real), "watercolour": ModelSource(fine_tune)}


@pytest.fixture(scope="session")
def result() -> Result:
    """Round figures of two models; one has no reference for its Fréchet distance."""

    def model(shift: float, fd: float) -> ModelResult:
        by_w = {"2": 0.2 + shift, "7": 0.4 + shift}
        return ModelResult(
            guidance_error=GuidanceError(0.3 + shift, by_w, {"0.999": 0.5, "0.499": 0.2}, 0.9),
            latent_mse_ratio=0.2 + shift,
            gain_kept=0.9 - shift,
            gain_kept_interval=Interval(0.8 - shift, 0.95 - shift),
            gain_kept_cosine=0.8,
            scores={
                "none": Scores(0.2, 0.4, 0.1, fd),
                "cfg": Scores(0.6, 0.8, 0.3, fd / 2),
                "guided": Scores(0.56, 0.75, 0.28, fd / 2),
            },
            agreement={"guided": Agreement(24.0, 0.9, 0.95), "none": Agreement(15.0, 0.5, 0.6)},
        )

    return Result(
        models={"base": model(0.0, 40.0), "watercolour": model(0.1, float("nan"))},
        guide=GuideSize("tiny", 67_321, 0.0099),
        cost=Cost(
            cfg_over_guided={"1": 1.6, "8": 1.75},
            cfg_over_none={"1": 1.8, "8": 1.9},
            flops={"none": 1_000_000_000, "cfg": 2_000_000_000, "guided": 1_020_000_000},
            passes={"none": 25.0, "cfg": 50.0, "guided": 25.0},
            seconds={"1": {"none": 0.1, "cfg": 0.18, "guided": 0.11}},
        ),
        run=Run("pilotfish evaluate --seed 1", 1, 100, 4.0, 25, "a processor", {"torch": "2"}),
    )
