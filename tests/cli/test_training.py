"""Trainings as their user meets them: both stages, every guide type, and from their own file."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import baselines  # noqa: F401
from pilotfish import cli
from pilotfish.guides import Guide
from pilotfish.training import validation
from pilotfish.training.config import DistillConfig
from pilotfish.training.history import describe_training
from tests.cli.conftest import SHORT, Say

ONE_STEP = (*SHORT, "--max_train_steps", "1")


@pytest.fixture(autouse=True)
def _short_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "STEPS", 2)


def test_both_stages_from_a_base_of_ones_own(
    randomise: Any, say: Say, base: str, prompts: str, tmp_path: Path
) -> None:
    """Distil, halve the steps twice, draw with the last guide; resume does nothing twice."""
    own = ("--pretrained_model_name_or_path", base)
    texts = ("--prompts", prompts, "--validation_prompts", prompts)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert say("distill", *own, *texts, "--output", first, *SHORT)[0] == 0
    steps = (
        "distill-steps", *own, *texts, "--guide", f"{first}/guide", "--steps", "4", "2",
        "--output", second, *SHORT,
    )  # fmt: skip
    assert say(*steps)[0] == 0
    four, made = (
        Path(second) / f"steps-{n}" / "guide" / "diffusion_pytorch_model.safetensors"
        for n in (4, 2)
    )
    when, before = four.stat().st_mtime_ns, load_file(made)
    shutil.rmtree(made.parent)
    shutil.rmtree(made.parent.parent / "checkpoint-4")  # as if it had been stopped at step 2
    free = (
        "--resume_from_checkpoint",
        "latest",
        "--validation_steps",
        "2",
        "--checkpointing_steps",
        "1",
    )
    code, error = say(*steps, *free, "--learning_rate", "0.1", "--seed", "1")
    assert (code, error.count("\n")) == (1, 1)
    assert "learning_rate is None in the finished round, 0.1 in the configuration; seed is" in error
    code, error = say(*steps, *free, "--steps", "8", "4")
    assert "steps is (4,) in the finished round, (8, 4) in the configuration" in error
    assert not (Path(second) / "steps-8").exists()
    begun = Path(first) / "guide"
    first_weights = begun / "diffusion_pytorch_model.safetensors"
    kept = first_weights.read_bytes()
    randomise(Guide.from_pretrained(begun)).save_pretrained(begun)
    code, error = say(*steps, *free)
    assert (code, error.count("\n")) == (1, 1)
    assert "steps-4: it began with other weights than the guide has now" in error
    first_weights.write_bytes(kept)
    assert say(*steps, "--resume_from_checkpoint", "latest")[0] == 0
    assert four.stat().st_mtime_ns == when
    again = load_file(made)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert (Path(second) / "steps-4" / "validation" / "step-4.png").is_file()
    told = describe_training(made.parent.parent)
    assert "--steps 4 2" in told
    assert "8 steps, 32 samples" in told
    assert "steps-2" not in told
    assert "--steps 4\n" in describe_training(four.parent.parent)
    with warnings.catch_warnings():  # steps and scheduler are the guide's own
        warnings.simplefilter("error", UserWarning)
        code, _ = say(
            "sample", "-p", "cat", "dog", "--models", base, "--guide", str(made.parent),
            "--negative_prompt", "", "--output", str(tmp_path / "images"),
        )  # fmt: skip
    assert code == 0
    assert Image.open(tmp_path / "images" / "grid.png").size == (32, 16)


@pytest.mark.parametrize("kind", [k for k in Guide.registry if k != "tiny"])
def test_every_type_is_distilled_and_used(
    say: Say, base: str, prompts: str, tmp_path: Path, kind: str
) -> None:
    code, _ = say(
        "distill", "--pretrained_model_name_or_path", base, "--prompts", prompts, "--guide_type",
        kind, "--output", str(tmp_path / "run"), *ONE_STEP,
    )  # fmt: skip
    assert code == 0
    code, _ = say(
        "sample", "-p", "cat", "--models", base, "--guide", str(tmp_path / "run" / "guide"),
        "--num_inference_steps", "2", "--output", str(tmp_path / "images"),
    )  # fmt: skip
    assert code == 0


def test_a_run_is_repeated_from_its_own_file(
    base: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--pretrained_model_name_or_path", base, "--prompts", prompts, "--rank", "4", *ONE_STEP)
    assert cli.main(["distill", *own, "--output", str(tmp_path / "one")]) == 0
    assert "(on training prompts)" in capsys.readouterr().out
    file = tmp_path / "one" / "config.json"
    assert DistillConfig.load(file).guide.rank == 4
    again = ("--config", str(file), "--validation_prompts", prompts)
    assert cli.main(["distill", *again, "--output", str(tmp_path / "two")]) == 0
    assert "(held out)" in capsys.readouterr().out
    one, two = (Guide.from_pretrained(tmp_path / n / "guide") for n in ("one", "two"))
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
