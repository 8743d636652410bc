"""Scores by number of steps and by guidance scale."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.curves import Method, score_guidance_scales, score_steps
from pilotfish.evaluation.images import ModelScorer, ModelSource
from pilotfish.evaluation.plots import curve
from pilotfish.evaluation.results import CurveResult
from pilotfish.evaluation.run import evaluate_model
from pilotfish.evaluation.tables import curve_markdown, curve_rows, curve_table
from pilotfish.guidances import Guidance
from pilotfish.guides import Guide, TinyGuide
from pilotfish.pipelines import Reference
from pilotfish.pipelines.loading import use_deterministic_scheduler


def few(guide: Guide, steps: int) -> Guide:
    """As if it had been distilled to so many steps."""
    other = deepcopy(guide)
    other.register_to_config(times=[0.9 / steps * (k + 1) for k in range(steps)][::-1])
    return other


@pytest.fixture
def given(scorer: Scorer, names: list[str]) -> dict[str, Any]:
    """Settings of both functions."""
    return {"names": names, "command": "", "scorer": scorer, "samples": 3, "batch_size": 2}


def test_every_method_is_measured_at_the_steps_that_it_serves(
    models: dict[str, ModelSource], given: dict[str, Any], moved: Guide, tmp_path: Path
) -> None:
    methods = {"any": [moved], "few": [few(moved, 2)]}
    found = score_steps(models, methods, (2, 1), rounds=1, **given)
    for of_model in found.models.values():
        assert {method: list(points) for method, points in of_model.items()} == {
            "none": ["1", "2"], "cfg": ["1", "2"], "any": ["1", "2"], "few": ["2"],
        }  # fmt: skip
        assert of_model["few"]["2"].scores.cosine == pytest.approx(
            of_model["any"]["2"].scores.cosine
        )
        assert [p.passes for p in of_model["cfg"].values()] == [2, 4]
        assert [p.passes for p in of_model["any"].values()] == [1, 2]
    assert found.wall_clock["cfg"]["2"] == 1
    assert set(found.guides) == {"any", "few-2"}
    found.save(tmp_path / "steps.json")
    assert CurveResult.load(tmp_path / "steps.json").to_json() == found.to_json()
    assert len(curve_rows(found, "base")) == curve_table(found, "base").row_count == 7
    assert curve_markdown(found, "base").count("\n") == 9
    assert len(curve(found, "base").axes) == 2


def test_points_are_those_of_an_evaluation(
    models: dict[str, ModelSource], given: dict[str, Any], moved: Guide
) -> None:
    base = {"base": models["base"]}
    by_steps = score_steps(base, {}, (2,), rounds=1, **given).models["base"]
    found = score_guidance_scales(base, {"tiny": [moved]}, (4, 1), num_inference_steps=2, **given)
    by_scale = found.models["base"]
    names = given["names"]
    model = evaluate_model(
        base["base"].load(), moved, prompts=names, names=names, scorer=given["scorer"],
        reference_images=base["base"].reference_images, validation_prompts=["cat"], samples=3,
        num_inference_steps=2, batch_size=2,
    )  # fmt: skip
    assert by_scale["none"]["1"].scores == by_steps["none"]["2"].scores == model.scores["none"]
    assert by_scale["cfg"]["4"].scores == by_steps["cfg"]["2"].scores == model.scores["cfg"]
    assert by_scale["tiny"]["4"].scores == model.scores["guided"]
    assert list(by_scale["cfg"]) == ["1", "4"]
    assert by_scale["cfg"]["1"] == by_scale["none"]["1"]
    assert by_scale["cfg"]["4"].passes == 2 * by_scale["tiny"]["4"].passes
    assert found.wall_clock == {}
    assert curve_table(found, "base").row_count == 5
    assert len(curve(found, "base").axes) == 2


def test_steps_are_those_of_ddim_whatever_the_scheduler(
    models: dict[str, ModelSource], given: dict[str, Any]
) -> None:
    """SD 1.5 comes with PNDM, at whose timesteps no guide for few steps was ever trained."""

    def other() -> Any:
        pipe = models["base"].load()
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
        return pipe

    sources = {"ddim": models["base"], "pndm": ModelSource(other, models["base"].reference_images)}
    found = score_steps(sources, {}, (2,), rounds=1, **given).models
    assert found["ddim"] == found["pndm"]


def test_a_solver_without_a_clipping_setting_gets_none(pipe: Any) -> None:
    """DDIM clips clean latents to [-1, 1] by default, and theirs are wider."""
    pipe.scheduler = EulerDiscreteScheduler()
    use_deterministic_scheduler(pipe)
    assert not pipe.scheduler.config.clip_sample
    pipe.scheduler = DDIMScheduler(clip_sample=True)  # asked for, it stays
    use_deterministic_scheduler(pipe)
    assert pipe.scheduler.config.clip_sample


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"models": {}}, "no model"), ({"steps": ()}, "one number of steps"),
        ({"steps": (0,)}, "one number of steps"), ({"guidance_scale": 1.0}, "w = 1"),
        ({"samples": 1}, "at least two samples"), ({"rounds": 0}, "at least one round"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    models: dict[str, ModelSource], given: dict[str, Any], wrong: dict[str, Any], sentence: str
) -> None:
    steps = wrong.pop("steps", (2,))
    with pytest.raises(ValueError, match=sentence):
        score_steps(wrong.pop("models", models), {}, steps, **given | wrong)


def test_what_a_model_does_not_take_is_refused_before_any_image(
    models: dict[str, ModelSource], given: dict[str, Any], moved: Guide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ModelScorer, "score", pytest.fail)
    unfit = TinyGuide.for_denoiser(models["base"].load().unet, "v_prediction")
    for methods, refresh, sentence in (
        ({"tiny": [moved]}, -1, "refresh must be"),
        ({"tiny": [moved], "unfit": [unfit]}, None, "made for another denoiser"),
        ({"weak": [Reference(Guidance("autoguidance", weak_model="gone"))]}, None, "no weaker"),
    ):
        with pytest.raises(ValueError, match=sentence):
            score_steps(models, methods, (2,), refresh=refresh, **given)


def test_guides_that_exclude_one_another(
    models: dict[str, ModelSource], given: dict[str, Any], moved: Guide
) -> None:
    with pytest.raises(ValueError, match="two guides of one name for 2 steps"):
        Method.of([few(moved, 2), few(moved, 2)])
    with pytest.raises(ValueError, match="any number of steps"):
        Method.of([moved, moved])
    with pytest.raises(ValueError, match="few was distilled to another number than 25"):
        score_guidance_scales(models, {"few": [few(moved, 2)]}, (4,), **given)
    with pytest.raises(ValueError, match="at least one guidance scale"):
        score_guidance_scales(models, {}, (), **given)


def test_it_resumes(
    models: dict[str, ModelSource], given: dict[str, Any], moved: Guide, tmp_path: Path
) -> None:
    reported: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        reported.append(what)
        if len(reported) == 7:
            raise KeyboardInterrupt

    def run(**more: Any) -> CurveResult:
        return score_steps(models, {"tiny": [moved]}, (1, 2), rounds=1, **given | more)

    with pytest.raises(KeyboardInterrupt):
        run(progress=progress, unfinished=tmp_path / "u.json")
    before = set(reported[:6])
    resumed = run(progress=progress, unfinished=tmp_path / "u.json")
    assert not before & set(reported[7:]), "a finished point was measured again"
    assert repr(resumed.models) == repr(run().models)
