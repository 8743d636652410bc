"""Negative prompts with a guide, against those with CFG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelSource
from pilotfish.evaluation.negatives import evaluate_negatives, evaluate_negatives_of_model, pairs
from pilotfish.evaluation.results import NegativeResult
from pilotfish.evaluation.tables import negatives_table
from pilotfish.guides import Guide, TinyGuide

STEPS: dict[str, Any] = {"num_inference_steps": 2}


def test_every_prompt_has_another_as_its_negative() -> None:
    assert pairs(["a", "b", "c", "d", "e"]) == ["c", "d", "e", "a", "b"]
    for prompts in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="two that differ"):
            pairs(prompts)


class Stopped(Exception):
    pass


def test_every_model_is_measured_and_a_measurement_resumes(
    models: dict[str, ModelSource], scorer: Scorer, names: list[str], moved: Guide, tmp_path: Path
) -> None:
    reported: list[str] = []

    def run(file: Path | None = tmp_path / "u.json", stop: str = " ") -> NegativeResult:
        def progress(what: str, done: int, total: int) -> None:
            reported.append(what)
            if what.startswith(stop):
                raise Stopped

        reported.clear()
        return evaluate_negatives(
            models, moved, names[:4], guide_name="tiny", command="", scorer=scorer, batch_size=4,
            unfinished=file, progress=progress, **STEPS,
        )  # fmt: skip

    whole = run(file=None)
    assert list(whole.models) == list(models)
    for model in whole.models.values():
        assert model.conditioned.mean != model.ignoring.mean
        assert model.ratio == model.conditioned.mean / model.null.mean
        assert model.ratio_ignoring == model.ignoring.mean / model.null.mean
        assert 0 < model.latent_mse_ratio < math.inf
        assert model.agreement["conditioned"] != model.agreement["ignoring"]
    whole.save(tmp_path / "negative.json")
    assert NegativeResult.load(tmp_path / "negative.json").to_json() == whole.to_json()
    assert negatives_table(whole).row_count == len(models)

    with pytest.raises(Stopped):
        run(stop="watercolour: images")
    assert run().to_json() == whole.to_json()
    assert reported
    assert not any(what.startswith("base") for what in reported)
    with torch.no_grad():
        next(moved.parameters()).mul_(1.5)
    run()
    assert any(what.startswith("base") for what in reported), "another guide"


def test_with_the_null_prompt_nothing_is_ignored(
    pipe: Any, scorer: Scorer, names: list[str], moved: Guide
) -> None:
    model = evaluate_negatives_of_model(pipe, moved, names[:2], ["", ""], scorer, **STEPS)
    assert model.null == model.conditioned == model.ignoring
    assert model.ratio == 1
    assert model.agreement["conditioned"] == model.agreement["ignoring"] == model.agreement["null"]


def test_with_both_passes_in_every_step_there_is_no_error(
    pipe: Any, scorer: Scorer, names: list[str], moved: Guide
) -> None:
    model = evaluate_negatives_of_model(
        pipe, moved, names[:2], names[2:4], scorer, refresh=2, **STEPS
    )
    assert max(model.null.mean, model.conditioned.mean) < 1e-8 < model.ignoring.mean
    assert model.agreement["null"].cosine == pytest.approx(1, abs=1e-4)


def test_bad_input_is_refused(
    models: dict[str, ModelSource], scorer: Scorer, names: list[str], moved: Guide
) -> None:
    given: dict[str, Any] = {"guide_name": "", "command": "", "scorer": scorer}
    with pytest.raises(ValueError, match="there is no model"):
        evaluate_negatives({}, moved, names, **given)
    with pytest.raises(ValueError, match="no effect at w = 1"):
        evaluate_negatives(models, moved, names, guidance_scale=1.0, **given)
    unfit = TinyGuide.for_denoiser(models["base"].load().unet, "v_prediction")
    with pytest.raises(ValueError, match="made for another denoiser"):
        evaluate_negatives(models, unfit, names, progress=pytest.fail, **given)
