from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelSource, draw_modes, spread_prompts
from pilotfish.evaluation.results import Result
from pilotfish.evaluation.run import evaluate, evaluate_model
from pilotfish.evaluation.speed import measure_cost
from pilotfish.guidance import GuidanceMode
from pilotfish.guidances import Guidance
from pilotfish.guides import Guide, TinyGuide

SMALL: dict[str, Any] = {"samples": 3, "num_inference_steps": 2, "batch_size": 2}
ERROR: dict[str, Any] = {"validation_prompts": ["cat", "a"], "guidance_scales": (4.0,)}


@pytest.fixture
def settings(scorer: Scorer, names: list[str], real: Path) -> dict[str, Any]:
    """Of one model."""
    return {
        "prompts": names, "names": names, "reference_images": real, "scorer": scorer,
        **SMALL, **ERROR,
    }  # fmt: skip


def test_prompts_are_repeated_with_new_seeds() -> None:
    assert spread_prompts(["a", "b"], 5, 10) == (list("ababa"), [10, 11, 12, 13, 14])
    with pytest.raises(ValueError, match="at least one"):
        spread_prompts([], 5, 0)


def test_few_images_are_of_prompts_from_the_whole_list() -> None:
    """Lists are sorted by category: the first few would all be animals."""
    assert spread_prompts(list("abcdefghi"), 4, 0)[0] == list("aceg")


def test_the_modes_start_from_the_same_noise(pipe: Any, guide: Guide) -> None:
    """A fresh guide changes nothing, so its images are those without guidance."""
    settings = {"guidance_scale": 4.0, "num_inference_steps": 2, "batch_size": 2}
    batches = list(draw_modes(pipe, guide, list("abc"), [1, 2, 3], **settings))
    assert [len(b["cfg"].prompts) for b in batches] == [2, 1]
    for batch in batches:
        assert set(batch) == set(GuidanceMode)
        assert torch.allclose(batch["guided"].latents, batch["none"].latents, atol=1e-5)
        assert not torch.allclose(batch["cfg"].latents, batch["none"].latents, atol=1e-3)


def test_a_fresh_guide_measures_as_no_guide(
    pipe: Any, guide: Guide, settings: dict[str, Any]
) -> None:
    found = evaluate_model(pipe, guide, **settings)
    none, guided = found.scores["none"], found.scores["guided"]
    assert found.guidance_error.mean == pytest.approx(1, abs=1e-4)
    assert found.latent_mse_ratio == pytest.approx(1, abs=1e-3)
    assert found.gain_kept_cosine == pytest.approx(0, abs=1e-2)
    assert guided.cosine == pytest.approx(none.cosine, abs=1e-5)
    assert guided.fd_clip == pytest.approx(none.fd_clip, rel=1e-3)
    assert found.agreement["guided"].psnr == pytest.approx(found.agreement["none"].psnr, rel=1e-3)


def test_with_a_refresh_at_every_step_a_guide_measures_as_cfg(
    pipe: Any, moved: Guide, settings: dict[str, Any]
) -> None:
    found = evaluate_model(pipe, moved, refresh=2, **settings)
    assert found.latent_mse_ratio == pytest.approx(0, abs=1e-6)
    assert found.gain_kept_cosine == pytest.approx(1, abs=1e-2)
    assert found.guidance_error.mean < 1e-8


def test_a_guide_is_compared_with_what_it_was_taught(
    pipe: Any, moved: Guide, settings: dict[str, Any]
) -> None:
    moved.register_to_config(teacher=Guidance("slg").plain())
    found = evaluate_model(pipe, moved, refresh=2, **settings)
    assert found.latent_mse_ratio == pytest.approx(0, abs=1e-6)
    assert found.guidance_error.mean < 1e-8
    cost = measure_cost(pipe, moved, num_inference_steps=2, rounds=1, batch_sizes=(1,))
    assert cost.passes == {"none": 2, "cfg": 6, "guided": 2}


def test_batches_make_no_difference(pipe: Any, moved: Guide, settings: dict[str, Any]) -> None:
    one, three = (evaluate_model(pipe, moved, **{**settings, "batch_size": n}) for n in (1, 3))
    assert one.scores["cfg"].fd_clip == pytest.approx(three.scores["cfg"].fd_clip, rel=1e-2)
    assert one.latent_mse_ratio == pytest.approx(three.latent_mse_ratio, rel=1e-3)
    assert one.scores["guided"].cosine == pytest.approx(three.scores["guided"].cosine, abs=1e-4)
    assert one.agreement["guided"].ssim == pytest.approx(three.agreement["guided"].ssim, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": 1}, "at least two samples"), ({"guidance_scale": 1.0}, "gains nothing at w = 1"),
     ({"prompts": ["dog"]}, "not among the names"),
     ({"inception_weights": "gone.pth"}, "no Inception weights in gone.pth"),
     ({"clip": "gone"}, "no CLIP in gone"), ({"reference_images": "gone"}, "metadata.jsonl")],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(
    pipe: Any, guide: Guide, settings: dict[str, Any], change: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pilotfish.evaluation.run.pipeline_guidance_error", pytest.fail)
    with pytest.raises(ValueError, match=message):
        evaluate_model(pipe, guide, **{**settings, **change})


def test_no_model(moved: Guide, scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="no model"):
        evaluate({}, moved, guide_name="tiny", command="", scorer=scorer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": "gone"}, "no CLIP in gone"),
        ({"inception_weights": "gone.pth"}, "no Inception weights in gone.pth"),
        ({"inception_weights": "gone.pth", "models": ["base", "watercolour"]}, "of each model"),
        ({"refresh": -1}, "refresh must be"), ({"batch_size": 0}, "batch_size must be"),
        ({"teacher": "v_prediction"}, "made for another denoiser"),
    ],
)  # fmt: skip
def test_an_evaluation_refuses_bad_input_before_the_timing(
    models: dict[str, ModelSource], make_pipe: Callable[..., Any], moved: Guide, scorer: Scorer,
    names: list[str], change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("measure_cost", "evaluate_model"):
        monkeypatch.setattr(f"pilotfish.evaluation.run.{name}", pytest.fail)
    wanted, guide = change.pop("models", ["base"]), moved
    if prediction_type := change.pop("teacher", None):
        guide = TinyGuide.for_denoiser(make_pipe().unet, prediction_type)
    with pytest.raises(ValueError, match=message):
        evaluate(
            {name: models[name] for name in wanted}, guide, guide_name="", command="",
            prompts=names, names=names, scorer=scorer, **{**SMALL, **ERROR, **change},
        )  # fmt: skip


def test_reference_images_are_refused_before_any_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl"):
        ModelSource(pytest.fail, tmp_path)


class Stopped(Exception):
    pass


def test_every_model_is_measured_and_an_evaluation_resumes(
    models: dict[str, ModelSource], moved: Guide, scorer: Scorer, names: list[str], tmp_path: Path
) -> None:
    file, reported = tmp_path / "unfinished.json", list[tuple[str, int, int]]()

    def run(guide: Guide, stop: str = "", file: Path | None = file) -> Result:
        def progress(*what: Any) -> None:
            reported.append(what)
            if stop and what[0].startswith(stop):
                raise Stopped

        reported.clear()
        return evaluate(
            models, guide, guide_name="tiny", command="", prompts=names, names=names,
            scorer=scorer, rounds=1, batch_sizes=(1,), progress=progress, unfinished=file,
            **SMALL, **ERROR,
        )  # fmt: skip

    whole = run(moved, file=None)
    assert list(whole.models) == ["base", "watercolour"]
    base, other = whole.models.values()
    assert base.guidance_error != other.guidance_error
    assert base.scores["cfg"].fd_clip > 0
    assert other.scores["cfg"].fd_clip != other.scores["cfg"].fd_clip  # no reference images
    assert Result.from_json(whole.to_json()).to_json() == whole.to_json()
    assert reported[-1] == ("watercolour: images", 3, 3)
    assert (whole.run.samples, whole.run.dtype) == (3, "float32")

    with pytest.raises(Stopped):
        run(moved, "watercolour: images")
    resumed = run(moved)
    assert not any(what.startswith("base") for what, _, _ in reported)
    assert repr(resumed.models) == repr(whole.models)  # nan is not equal to itself
    for _ in range(2):  # a model may change the precision of a guide: still the same guide
        run(deepcopy(moved).half())
    assert not reported
    with torch.no_grad():
        next(moved.parameters()).mul_(1.5)
    assert repr(run(moved).models) != repr(resumed.models)
    assert any(what.startswith("base") for what, _, _ in reported), "another guide"


def test_models_of_another_precision(
    make_pipe: Callable[[], Any], moved: Guide, scorer: Scorer, names: list[str], real: Path
) -> None:
    models = {"base": ModelSource(lambda: make_pipe().to(torch.bfloat16), real)}
    found = evaluate(
        models, moved, guide_name="tiny", command="", prompts=names, names=names, scorer=scorer,
        rounds=1, batch_sizes=(1,), **SMALL, **ERROR,
    )  # fmt: skip
    assert found.run.dtype == "bfloat16"
    assert math.isfinite(found.models["base"].guidance_error.mean)
    assert found.models["base"].latent_mse_ratio > 0
