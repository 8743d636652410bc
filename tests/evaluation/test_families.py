"""Every measurement on pipelines of the transformer families."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.curves import score_guidance_scales, score_steps
from pilotfish.evaluation.images import ModelSource
from pilotfish.evaluation.inspection import inspect
from pilotfish.evaluation.negatives import evaluate_negatives
from pilotfish.evaluation.run import evaluate
from pilotfish.guides import Guide, TinyGuide
from tests.pipelines.pipelines import build, without_bins
from tests.pipelines.specs import PIPELINES


@pytest.fixture(
    params=[
        "SD3",
        "PixArt-Sigma",
        "Sana",
        "Lumina2",
        "AuraFlow",
        "FLUX.2 klein",
        "Chroma",
        "CogView4",
        "Qwen-Image",
        "Z-Image",
        "Wan",
        "LTX",
    ]
)
def measured(
    request: pytest.FixtureRequest, randomise: Callable[[Guide], Guide],
    monkeypatch: pytest.MonkeyPatch,
) -> Any:  # fmt: skip
    """(pipeline, a guide that changes images)."""
    pipe = build(request.param, alone=True).pipe
    without_bins(type(pipe), monkeypatch)
    predicted = PIPELINES[request.param].prediction_type
    return pipe, randomise(TinyGuide.for_denoiser(pipe.transformer, predicted))


def test_a_guide_is_measured(
    measured: tuple[Any, Guide], scorer: Scorer, names: list[str], real: Path
) -> None:
    pipe, guide = measured
    models = {"base": ModelSource(lambda: pipe, real)}
    small: dict[str, Any] = {"scorer": scorer, "command": "", "num_inference_steps": 2}
    found = evaluate(
        models, guide, guide_name="", prompts=names, names=names, validation_prompts=names[:2],
        samples=2, batch_size=2, rounds=1, batch_sizes=(1,), **small,
    )  # fmt: skip
    model, cost = found.models["base"], found.cost
    assert math.isfinite(model.guidance_error.mean)
    assert cost.passes == {"none": 2, "cfg": 4, "guided": 2}
    none, cfg, guided = (cost.flops[key] for key in ("none", "cfg", "guided"))
    if type(pipe).__name__ == "Lumina2Pipeline":  # whose prompt, with its long preface, is all here
        assert none < cfg < 2 * none < guided
    else:
        assert none < guided < cfg == 2 * none
    negatives = evaluate_negatives(models, guide, names[:2], guide_name="", **small)
    assert math.isfinite(negatives.models["base"].ratio)
    curve: dict[str, Any] = {"names": names, "command": "", "scorer": scorer, "samples": 2}
    by_steps = score_steps(models, {"tiny": [guide]}, (2,), rounds=1, **curve)
    assert by_steps.models["base"]["tiny"]["2"].passes == 2
    by_scale = score_guidance_scales(models, {}, (4,), num_inference_steps=2, **curve)
    assert by_scale.models["base"]["cfg"]["4"].passes == 4


def test_additions_are_inspected(measured: tuple[Any, Guide]) -> None:
    pipe, guide = measured
    found = inspect(pipe, guide, ["cat"], guidance_scales=(2.0, 4.0), num_inference_steps=2)
    for site in guide.target_modules:
        strengths = {a.guidance_scale: a.strength for a in found if a.site == site}
        assert strengths[4.0] > strengths[2.0] > 0
