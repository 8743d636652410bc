"""Stage 1 as its user meets it: it learns, and says why where it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from safetensors.torch import load_file

from pilotfish.guides import Guide
from pilotfish.guides.tiny import TinySettings
from pilotfish.interface import GuideError
from pilotfish.training import stages, validation
from pilotfish.training.checkpoint import list_checkpoints
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.history import load_settings
from pilotfish.training.pool import Pool
from pilotfish.training.stages import GuidanceTrainer, distill
from pilotfish.training.state import slow_precision
from pilotfish.training.trainer import TrainingError
from tests.components import randomise
from tests.pipelines.pipelines import build
from tests.training.runs import PROMPTS, same, small_guide, train

Context = Callable[..., TrainingContext]


def test_it_learns(
    config: DistillConfig, context: Context, prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "STEPS", 6)
    config = replace(
        config, max_train_steps=80, validation_steps=40, checkpointing_steps=400,
        learning_rate=2e-3, ema_decay=0.9, refresh_prob=0.0, guide=TinySettings(rank=4, head=48),
    )  # fmt: skip
    trained = train(config, context(prediction_type))
    folder = Path(config.output)
    history = json.loads((folder / "history.json").read_text())
    assert [row["step"] for row in history] == [40, 80]
    assert history[1]["guidance_error"] < history[0]["guidance_error"]
    last = json.loads((list_checkpoints(folder)[-1] / "state.json").read_text())
    assert last["smooth"]["guidance_error"] < 0.9
    assert (folder / "validation" / "step-80.png").is_file()
    # saved is the average
    saved = Guide.from_pretrained(folder / "guide")
    assert same(trained, saved)
    last = load_file(list_checkpoints(folder)[-1] / "state.safetensors")
    raw = {k[6:]: v for k, v in last.items() if k.startswith("guide.")}
    assert any(not torch.equal(raw[k], v) for k, v in saved.state_dict().items())


def test_a_guide_is_trained_further(
    config: DistillConfig, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts as the named guide; settings that are not defaults must agree."""
    made, began = context(), list[Guide]()

    class Watched(GuidanceTrainer):
        def run(self) -> Guide:
            began.append(deepcopy(self.guide))
            return super().run()

    monkeypatch.setattr(TrainingContext, "from_config", lambda config: made)
    monkeypatch.setattr(stages, "GuidanceTrainer", Watched)
    own = {"rank": 4, "condition_on_negative": True, "head": 8, "uncond_templates": 2}
    config = replace(config, guide=own, max_train_steps=2)
    first = distill(config)
    folder = str(tmp_path / "run" / "guide")
    again = replace(config, output=str(tmp_path / "again"), init_from=folder)
    further = distill(again)
    assert not same(began[0], first)
    assert same(began[1], first)
    assert not same(further, first)
    recommends = deepcopy(first)
    recommends.register_to_config(refresh_ratio=0.5)
    recommends.save_pretrained(tmp_path / "ratio")
    ratio = replace(again, output=str(tmp_path / "from-ratio"), init_from=str(tmp_path / "ratio"))
    assert same(distill(ratio), further)
    # the rest is the guide's, and its share is no longer known
    for part in ({}, {"uncond_templates": 2}, {"share": 0.5, "head": 8}):
        unsaid = replace(again, output=str(tmp_path / f"unsaid-{len(part)}"), guide=part)
        assert same(distill(unsaid), further)
        assert load_settings(Path(unsaid.output)) == replace(unsaid, guide=config.guide)
    other = replace(again, output=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"guide: rank is 4 in the guide, 8 in the configuration"):
        distill(replace(other, guide={"rank": 8}))
    with pytest.raises(ConfigError, match=r": guide_type is tiny in the guide, full in the conf"):
        distill(replace(other, guide_type="full", guide=None))
    made = context("v_prediction")
    words = (
        r"^this TinyGuide was made for another denoiser: [^{]*prediction_type: guide epsilon, de"
    )
    with pytest.raises(GuideError, match=words):
        distill(other)
    made = context()
    with pytest.raises(ConfigError, match=r"Cannot continue training .*: training_samples is "):
        distill(replace(again, resume_from_checkpoint="latest", training_samples="on_policy"))
    other = "checkpoint-2 began with another guide; its SHA-256 differs"
    with pytest.raises(ConfigError, match=other):
        distill(replace(again, resume_from_checkpoint="latest", init_from=None))
    randomise(deepcopy(first)).save_pretrained(folder)
    with pytest.raises(ConfigError, match=other):
        distill(replace(again, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_the_settings_of_refreshes_reach_the_samples(
    config: DistillConfig, context: Context, monkeypatch: pytest.MonkeyPatch, prob: float
) -> None:
    """At the first step of a trajectory, or never there."""
    made: list[Pool] = []
    plain = GuidanceTrainer.pool

    def pool(self: Any, *given: Any) -> Pool:
        made.append(plain(self, *given))
        return made[-1]

    monkeypatch.setattr(GuidanceTrainer, "pool", pool)
    settings = {"refresh_prob": 1.0, "first_step_refresh_prob": prob}
    settings |= {"max_train_steps": 1, "trajectory_steps_min": 32, "trajectory_steps_max": 32}
    train(replace(config, pool=64, **settings), context())
    assert made
    for one in made:
        first = one.due[one.position == 0] == 0
        assert first.float().mean() == 1 if prob else first.float().mean() < 0.5


def test_the_student_sees_the_negative_prompts_of_its_samples(
    config: DistillConfig, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[torch.Tensor, Any]] = []
    plain = GuidanceTrainer.texts

    def texts(self: Any, prompt: torch.Tensor, negative: torch.Tensor) -> Any:
        both = plain(self, prompt, negative)
        shown.append((negative, both[1]))
        return both

    monkeypatch.setattr(GuidanceTrainer, "texts", texts)
    given = context()
    with_them = train(replace(config, negative_prompt_prob=1.0), given)
    for negative, conditions in shown:
        assert (negative >= 0).all()
        assert torch.equal(conditions.embeds, given.texts(negative).embeds)
    assert len(shown) == config.max_train_steps
    for name, change in (("null", {}), ("seed", {"negative_prompt_prob": 1.0, "seed": 1})):
        elsewhere = replace(config, output=f"{config.output}-{name}", **change)
        assert not same(with_them, train(elsewhere, given))


@pytest.mark.parametrize("what", ["nan", "base", "error"])
def test_what_goes_wrong_is_said_and_leaves_no_hook(
    what: str, config: DistillConfig, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, real, calls = context(), stages.guidance_loss, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        if what == "base":
            given.pipe.unet.conv_in.bias.data.add_(1e-3)
        if what == "error":
            raise RuntimeError("broken")
        return real(*args) * (float("nan") if what == "nan" and len(calls) == 4 else 1.0)

    monkeypatch.setattr(stages, "guidance_loss", broken)
    error, words = {
        "nan": (TrainingError, "nan at step 4; the last good checkpoint is checkpoint-2"),
        "base": (TrainingError, "base denoiser changed"),
        "error": (RuntimeError, "broken"),
    }[what]
    with pytest.raises(error, match=words):
        train(config, given)
    if what == "nan":
        assert [p.name for p in list_checkpoints(Path(config.output))] == ["checkpoint-2"]
    modules = list(given.pipe.unet.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_base_that_needs_an_image_is_refused(make_pipe: Callable[[str], Any]) -> None:
    """Before anything is encoded."""
    parts = make_pipe("epsilon").components
    image_to_image = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ConfigError, match="a StableDiffusionImg2ImgPipeline, which needs an image"):
        TrainingContext(image_to_image, PROMPTS, PROMPTS)
    inpainting = make_pipe("epsilon")
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(ConfigError, match="takes 9 channels and predicts 4"):
        TrainingContext(inpainting, PROMPTS, PROMPTS)


def test_a_base_with_two_denoisers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a WanPipeline with two denoisers, .* such as Wan 2\.1"):
        TrainingContext(build("Wan 2.2").pipe, PROMPTS, PROMPTS)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Image edit",
        "Qwen-Image ControlNet",
        "SD3 ControlNet",
        "Wan 2.1 image-to-video",
        "Wan 2.2 image-to-video",
    ],
)
def test_a_pipeline_that_edits_or_is_controlled_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Pipeline, which needs an image as input"):
        TrainingContext(build(name).pipe, PROMPTS, PROMPTS)


def test_a_scheduler_of_other_timesteps_is_refused(make_pipe: Callable[[str], Any]) -> None:
    pipe = make_pipe("epsilon")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, num_train_timesteps=50)
    with pytest.raises(ConfigError, match=r"has 50 num_train_timesteps, but .* with 1000"):
        TrainingContext(pipe, PROMPTS, PROMPTS)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("processor", ["AVX2", "AVX512", "DEFAULT"])
def test_emulated_precision_is_noted(
    processor: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    line = slow_precision(precision, torch.device("cpu"))
    assert (line is not None) == (processor == "AVX2" and precision != "no")
    assert line is None or precision in line
    assert slow_precision(precision, torch.device("cuda")) is None


def test_training_begins_with_that_note(
    config: DistillConfig, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pilotfish.training.state.slow_precision", lambda precision, device: precision
    )
    given, lines = context(), list[str]()
    GuidanceTrainer(config, given, small_guide(given.pipe.unet), log=lines.append)
    assert lines == ["no"]
