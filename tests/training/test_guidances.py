"""Training a guide on another guidance than CFG."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.guidances import CFG, Guidance
from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.stages import GuidanceTrainer, distill, new_guide
from tests.test_guidances import GUIDANCES
from tests.training.runs import VALIDATION, same, train, train_steps

Make = Callable[..., TrainingContext]
APG, SLG = GUIDANCES["apg"], GUIDANCES["slg"]


@pytest.mark.parametrize("name", ["apg", "slg", "autoguidance"])
def test_a_guide_says_what_it_was_taught(config: DistillConfig, context: Make, name: str) -> None:
    taught = GUIDANCES[name]
    config = replace(config, teacher=taught, training_samples="on_policy")
    guide = train(config, context())
    saved = Path(config.output) / "guide"
    assert json.loads((saved / "config.json").read_text())["teacher"] == taught.plain()
    assert Guide.from_pretrained(saved).guidance == guide.guidance == taught
    assert DistillConfig.load(Path(config.output) / "config.json").teacher == taught
    plain = train(replace(config, teacher=CFG, output=config.output + "-cfg"), context())
    assert plain.guidance == CFG
    assert not same(guide, plain)


def test_the_targets_are_the_guidance(config: DistillConfig, context: Make) -> None:
    made, w = context(), torch.tensor([2.0, 6.0])
    config = replace(config, teacher=SLG)
    trainer = GuidanceTrainer(config, made, new_guide(config, made))
    z = torch.randn(2, *made.latent_shape)
    given = z, torch.tensor([0.9, 0.3]), torch.tensor([0, 1]), torch.tensor([-1, 2])
    n, c = made.teacher()(*given)
    second, conditional = trainer.teacher(*given)
    torch.testing.assert_close(conditional, c, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(second, n, atol=1e-4)
    degraded = c - (n - second) / SLG.degraded_scale
    strength = (w - 1)[:, None, None, None]
    expected = c + strength * (c - n) + SLG.degraded_scale * strength * (c - degraded)
    torch.testing.assert_close(
        trainer.teacher.guided(second, conditional, w), expected, atol=1e-4, rtol=1e-4
    )


def test_a_resumed_run_teaches_the_same(config: DistillConfig, context: Make) -> None:
    config = replace(config, teacher=APG)
    train(config, context())
    for other in (CFG, replace(APG, eta=0.9)):
        with pytest.raises(ConfigError, match=r"teacher is .*apg.* in the checkpoint"):
            train(
                replace(config, teacher=other, resume_from_checkpoint="latest", max_train_steps=6),
                context(),
            )


def test_a_guide_of_cfg_may_be_taught_another(saved_base: DistillConfig) -> None:
    folder = saved_base.output
    distill(saved_base)
    again = replace(
        saved_base, init_from=f"{folder}/guide", teacher=APG, output=f"{folder}-apg",
        max_train_steps=2,
    )  # fmt: skip
    assert distill(again).guidance == APG
    third = replace(again, init_from=f"{folder}-apg/guide", teacher=CFG, output=f"{folder}-more")
    assert distill(third).guidance == APG, "what it was taught, where nothing is named"


def test_fewer_steps_keep_the_guidance(
    steps_config: StepsConfig, config: DistillConfig, context: Make
) -> None:
    made = context()
    first = new_guide(replace(config, teacher=SLG), made)
    student = train_steps(replace(steps_config, teacher="cfg"), made, first)
    assert student.guidance == SLG


def test_a_guide_is_measured_against_what_it_was_taught(
    config: DistillConfig, context: Make
) -> None:
    made = context()
    guide, settings = new_guide(replace(config, teacher=APG), made), {"num_inference_steps": 2}
    of = Trajectories.of_pipeline
    with pytest.raises(GuideError, match=r"taught APG .* those of CFG"):
        pipeline_guidance_error(made.pipe, guide, of(made.pipe, VALIDATION, **settings))
    walk = of(made.pipe, VALIDATION, guidance=APG, **settings)
    assert pipeline_guidance_error(made.pipe, guide, walk).mean == pytest.approx(1.0)
    assert pipeline_guidance_error(made.pipe, guide, walk, refresh=1.0).mean == pytest.approx(0.0)


def test_a_weaker_model_teaches_without_refreshes(
    config: DistillConfig, context: Make, tmp_path: Path
) -> None:
    context().denoiser.save_pretrained(tmp_path / "weak")
    made = context()
    taught = Guidance("autoguidance", weak_model=str(tmp_path / "weak"))
    config = replace(config, teacher=taught)
    trainer = GuidanceTrainer(config, made, new_guide(config, made))
    assert trainer.pool(0, 0, trainer.sizes[0], (2, 4), 0.0).refresh_prob == 0
    texts = torch.tensor([0, 1])
    given = torch.randn(2, *made.latent_shape), torch.tensor([0.9, 0.3]), texts, texts
    for a, b in zip(trainer.teacher(*given), made.teacher()(*given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guidance": "agp"}, "guidance"),
        ({"guidance": "apg", "eta": "much"}, "eta must be a valid number"),
        ({"guidance": "slg", "eta": 0.1}, "eta is a setting of guidance apg"),
    ],
)
def test_wrong_settings_are_refused(given: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"output": "runs/x", "teacher": given}))
    with pytest.raises(ConfigError, match=words):
        DistillConfig.load(tmp_path / "c.json")


def test_types_that_cannot_say_it_are_refused(config: DistillConfig, context: Make) -> None:
    pytest.importorskip("baselines")
    made = replace(config, guide_type="agd", guide=None, teacher=APG)
    with pytest.raises(ConfigError, match="type agd can only be taught CFG"):
        new_guide(made, context())
