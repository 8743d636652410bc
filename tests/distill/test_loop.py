"""Stage 1 as its user meets it: it learns, resumes exactly, and loses nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from pilotfish.contract import PromptEmbeds
from pilotfish.distill import guidance_stage
from pilotfish.distill.checkpoints import CheckpointError, list_checkpoints
from pilotfish.distill.config import ConfigError, DistillConfig
from pilotfish.distill.guidance_stage import GuidanceDistillation
from pilotfish.distill.loop import DistillError, Interrupted
from pilotfish.distill.material import Material
from pilotfish.distill.precision import slowed_by
from pilotfish.distill.stages import distill
from pilotfish.guides import Guide, TinyGuide

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        output_dir=str(tmp_path / "run"), train_batch_size=4, max_train_steps=6, pool=8,
        replay_capacity=8, replay_reuse=2, trajectory_steps_min=2, trajectory_steps_max=4,
        checkpointing_steps=2, checkpoints_total_limit=None, validation_steps=6,
        lr_warmup_steps=1, report_to="none",
    )  # fmt: skip


@pytest.fixture
def material(make_pipe: Callable[[str], Any], tmp_path: Path) -> Callable[[str], Material]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, text in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (40 * i, 10, 200 - 30 * i)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return lambda prediction: Material(make_pipe(prediction), PROMPTS, ["tca", "act"], folder)


def train(config: DistillConfig, material: Material) -> Guide:
    torch.manual_seed(0)
    guide = TinyGuide.for_denoiser(
        material.pipe.unet, material.schedule.prediction_type, rank=4, condition=4
    )
    return GuidanceDistillation(config, material, guide, notice=lambda line: None).run()


def same(one: Guide, two: Guide) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("states", ["noised", "trajectory", "student"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_equals_uninterrupted(
    config: DistillConfig, material: Callable[[str], Material], states: Any, accumulation: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = replace(config, states=states, gradient_accumulation_steps=accumulation)
    whole = train(config, material("epsilon"))
    path = str(Path(config.output_dir) / "checkpoint-2")
    again = replace(config, output_dir=str(tmp_path / "again"), resume=path)
    assert same(whole, train(again, material("epsilon")))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_half_precision_resumes_and_leaves_the_guide_whole(
    config: DistillConfig, material: Callable[[str], Material], precision: Any, tmp_path: Path
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the first precision
    config = replace(config, mixed_precision=precision)
    whole = train(config, material("v_prediction"))
    path = str(Path(config.output_dir) / "checkpoint-4")
    again = replace(config, output_dir=str(tmp_path / "again"), resume=path)
    assert same(whole, train(again, material("v_prediction")))
    assert whole.dtype == torch.float32
    plain = replace(config, output_dir=str(tmp_path / "plain"), mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert same(whole, train(plain, material("v_prediction"))) == (precision == "no")


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("processor", ["AVX2", "AVX512", "DEFAULT"])
def test_precision_that_a_processor_only_imitates_is_noted(
    processor: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    line = slowed_by(precision, torch.device("cpu"))
    assert (line is not None) == (processor == "AVX2" and precision != "no")
    assert line is None or precision in line
    assert slowed_by(precision, torch.device("cuda")) is None


def test_training_begins_with_that_note(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pilotfish.distill.loop.slowed_by", lambda precision, device: precision)
    given, told = material("epsilon"), list[str]()
    guide = TinyGuide.for_denoiser(given.pipe.unet, "epsilon", rank=4)
    GuidanceDistillation(config, given, guide, notice=told.append)
    assert told == ["no"]


def test_a_guide_is_trained_further(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What it begins with is the guide that is named, which has to be what is asked for."""
    made, began = material("epsilon"), list[Guide]()

    class Watched(GuidanceDistillation):
        def run(self) -> Guide:
            began.append(deepcopy(self.guide))
            return super().run()

    monkeypatch.setattr(Material, "of", lambda config, pictures: made)
    monkeypatch.setattr("pilotfish.distill.stages.GuidanceDistillation", Watched)
    config = replace(config, rank=4, head=0, max_train_steps=2)
    first = distill(config)
    again = replace(
        config, output_dir=str(tmp_path / "again"), begin_with=str(tmp_path / "run/guide")
    )
    further = distill(again)
    assert not same(began[0], first)
    assert same(began[1], first)
    assert not same(further, first)
    with pytest.raises(ConfigError, match="guide cannot be trained further so: its rank is 4, 8"):
        distill(replace(again, rank=8))
    with pytest.raises(ConfigError, match=r"so: its kind is TinyGuide, FullGuide is asked for$"):
        distill(replace(again, guide="full"))
    for other in ({"begin_with": None}, {"states": "student"}):
        (name,) = other
        with pytest.raises(ConfigError, match=f"cannot be gone on with so: its {name} is "):
            distill(replace(again, resume="latest", **other))


def test_the_student_is_shown_the_negative_prompts_of_its_states(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[torch.Tensor, PromptEmbeds]] = []
    plain = GuidanceDistillation.texts

    def texts(self: Any, prompt: torch.Tensor, negative: torch.Tensor) -> Any:
        both = plain(self, prompt, negative)
        shown.append((negative, both[1]))
        return both

    monkeypatch.setattr(GuidanceDistillation, "texts", texts)
    given = material("epsilon")
    with_them = train(replace(config, negative_share=1.0), given)
    for negative, embeds in shown:
        assert (negative >= 0).all()
        assert torch.equal(embeds.hidden_states, given.texts(negative).hidden_states)
    assert len(shown) == config.max_train_steps
    elsewhere = replace(config, output_dir=f"{config.output_dir}-null")
    assert not same(with_them, train(elsewhere, given))
    with pytest.raises(ConfigError, match=r"its negative_share is 1\.0, 0\.5 is asked for"):
        train(replace(config, negative_share=0.5, resume="latest"), given)


def test_another_seed_gives_other_weights(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path
) -> None:
    one = train(config, material("epsilon"))
    other = replace(config, seed=1, output_dir=str(tmp_path / "other"))
    assert not same(one, train(other, material("epsilon")))


def test_it_learns(
    config: DistillConfig, material: Callable[[str], Material], prediction_type: str
) -> None:
    config = replace(config, max_train_steps=240, validation_steps=80, checkpointing_steps=400,
                     learning_rate=1e-2)  # fmt: skip
    train(config, material(prediction_type))
    history = json.loads((Path(config.output_dir) / "history.json").read_text())
    errors = [row["guidance_error"] for row in history]
    assert [row["step"] for row in history] == [80, 160, 240]
    assert errors[-1] < 0.9
    assert (Path(config.output_dir) / "validation" / "step-240.png").is_file()


def test_saved_guide_is_the_averaged_one(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    guide = train(config, material("epsilon"))
    saved = Guide.from_pretrained(Path(config.output_dir) / "guide")
    assert same(guide, saved)
    last = load_file(list_checkpoints(Path(config.output_dir))[-1] / "state.safetensors")
    raw = {k[6:]: v for k, v in last.items() if k.startswith("guide.")}
    assert any(not torch.equal(raw[k], v) for k, v in saved.state_dict().items())


def test_nan_stops_and_keeps_the_last_good_checkpoint(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = guidance_stage.relative_guidance_loss, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(guidance_stage, "relative_guidance_loss", broken)
    with pytest.raises(
        DistillError, match="nan at step 4; the last good checkpoint is checkpoint-2"
    ):
        train(config, material("epsilon"))
    assert [p.name for p in list_checkpoints(Path(config.output_dir))] == ["checkpoint-2"]


def test_a_base_that_changes_is_noticed(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuff = material("epsilon")
    real = guidance_stage.relative_guidance_loss

    def meddle(*args: Any) -> torch.Tensor:
        stuff.pipe.unet.conv_in.bias.data.add_(1e-3)
        return real(*args)

    monkeypatch.setattr(guidance_stage, "relative_guidance_loss", meddle)
    with pytest.raises(DistillError, match="base denoiser changed"):
        train(config, stuff)


def test_a_folder_in_use_is_refused(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    with pytest.raises(ConfigError, match="holds the checkpoints of an earlier run"):
        train(config, material("epsilon"))


def test_a_checkpoint_of_another_guide_is_refused(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    torch.manual_seed(0)
    stuff = material("epsilon")
    other = TinyGuide.for_denoiser(stuff.pipe.unet, "epsilon", rank=5, condition=4)
    again = replace(config, resume="latest")
    with pytest.raises(
        ConfigError, match="cannot be gone on with so: its rank is 4, 5 is asked for"
    ):
        GuidanceDistillation(again, stuff, other).run()


def test_a_checkpoint_without_streams_is_refused(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    for stream in list_checkpoints(Path(config.output_dir))[-1].glob("stream-*"):
        stream.unlink()
    with pytest.raises(CheckpointError, match="holds no streams"):
        train(replace(config, resume="latest"), material("epsilon"))


def test_a_run_that_fails_leaves_no_hook(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuff = material("epsilon")

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(guidance_stage, "relative_guidance_loss", broken)
    with pytest.raises(RuntimeError, match="broken"):
        train(config, stuff)
    modules = list(stuff.pipe.unet.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_another_base_is_refused_on_resume(
    config: DistillConfig, material: Callable[[str], Material]
) -> None:
    train(config, material("epsilon"))
    other = material("epsilon")
    other.pipe.unet.conv_in.bias.data.add_(1.0)
    with pytest.raises(ValueError, match="another base"):
        train(replace(config, resume="latest"), other)


def test_sigterm_saves_and_stops(
    config: DistillConfig, material: Callable[[str], Material], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    whole = train(config, material("epsilon"))
    real, calls = guidance_stage.relative_guidance_loss, []

    def asked(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    cut = replace(config, output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(guidance_stage, "relative_guidance_loss", asked)
        with pytest.raises(Interrupted, match="stopped at step 3"):
            train(cut, material("epsilon"))
    assert same(whole, train(replace(cut, resume="latest"), material("epsilon")))


@pytest.mark.slow
def test_kill_9_then_resume_gives_the_same_guide(
    config: DistillConfig, material: Callable[[str], Material], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    material("epsilon").pipe.save_pretrained(base)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = replace(
        config, pretrained_model_name_or_path=str(base), prompts=str(tmp_path / "prompts.txt"),
        max_train_steps=40, checkpointing_steps=5, validation_steps=40,
    )  # fmt: skip

    def start(folder: str, *more: str) -> subprocess.Popen[bytes]:
        path = tmp_path / f"{folder}.json"
        replace(config, output_dir=str(tmp_path / folder)).save(path)
        command = [sys.executable, "-m", "pilotfish", "distill", "--config", str(path), *more]
        return subprocess.Popen(command, stderr=subprocess.PIPE)

    whole = start("whole")
    assert whole.communicate()[0] is None
    assert whole.returncode == 0
    killed = start("killed")
    deadline = time.monotonic() + 120
    while not list_checkpoints(tmp_path / "killed") and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert list_checkpoints(tmp_path / "killed")
    assert not (tmp_path / "killed" / "guide").exists()
    assert start("killed", "--resume", "latest").wait() == 0
    weights = "guide/diffusion_pytorch_model.safetensors"
    one, two = ((tmp_path / f / weights).read_bytes() for f in ("whole", "killed"))
    assert one == two
