"""Trainings as their user meets them: both stages, every kind, once more from their own file."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pilotfish import cli
from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig
from pilotfish.training.trained import trained
from tests.cli.conftest import SHORT, Say

RIVALS = ("agd", "agd-attention", "dice", "cfg-lora", "guided-distillation")


def test_both_stages_from_a_base_of_ones_own(
    say: Say, base: str, prompts: str, tmp_path: Path
) -> None:
    """Distil, halve the steps twice, draw with the last guide; resume does nothing twice."""
    own = ("--pretrained_model_name_or_path", base)
    texts = ("--prompts", prompts, "--validation_prompts", prompts)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert say("distill", *own, *texts, "--output_dir", first, *SHORT)[0] == 0
    steps = (
        "distill-steps", *own, *texts, "--guide", f"{first}/guide", "--steps", "4", "2",
        "--output_dir", second, *SHORT,
    )  # fmt: skip
    assert say(*steps)[0] == 0
    four, made = (
        Path(second) / f"steps-{n}" / "guide" / "diffusion_pytorch_model.safetensors"
        for n in (4, 2)
    )
    when, before = four.stat().st_mtime_ns, load_file(made)
    shutil.rmtree(made.parent)
    shutil.rmtree(made.parent.parent / "checkpoint-4")  # as if it had been stopped at step 2
    assert say(*steps, "--resume", "latest")[0] == 0
    assert four.stat().st_mtime_ns == when
    again = load_file(made)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert (Path(second) / "steps-4" / "validation" / "step-4.png").is_file()
    told = trained(made.parent.parent)
    assert "--steps 4 2" in told
    assert "8 steps, 32 samples" in told
    assert "steps-2" not in told
    assert "--steps 4\n" in trained(four.parent.parent)
    with warnings.catch_warnings():  # steps and scheduler are the guide's own
        warnings.simplefilter("error", UserWarning)
        code, _ = say(
            "sample", "-p", "cat", "dog", *own, "--guide", str(made.parent), "--negative_prompt",
            "", "--output_dir", str(tmp_path / "pictures"), "--sheet", str(tmp_path / "sheet.png"),
        )  # fmt: skip
    assert code == 0
    assert Image.open(tmp_path / "sheet.png").width > 32


def test_prompts_of_ones_own_are_held_out_only_if_they_are(
    base: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--pretrained_model_name_or_path", base, "--prompts", prompts)
    assert cli.main(["distill", *own, *SHORT, "--output_dir", str(tmp_path / "one")]) == 0
    assert "(on training prompts)" in capsys.readouterr().out
    apart = ("--validation_prompts", prompts)
    assert cli.main(["distill", *own, *apart, *SHORT, "--output_dir", str(tmp_path / "two")]) == 0
    assert "(held out)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["external", "full", *RIVALS])
def test_every_kind_is_distilled_and_used(
    say: Say, base: str, prompts: str, tmp_path: Path, kind: str
) -> None:
    own = ("--pretrained_model_name_or_path", base)
    one_scale = ("--guidance_scale_min", "4", "--guidance_scale_max", "4")
    code, _ = say(
        "distill", *own, "--prompts", prompts, "--output_dir", str(tmp_path / "run"), *SHORT,
        "--guide", kind, *(one_scale if kind in ("dice", "cfg-lora") else ()),
    )  # fmt: skip
    assert code == 0
    code, _ = say(
        "sample", "-p", "cat", *own, "--guide", str(tmp_path / "run" / "guide"),
        "--num_inference_steps", "2", "--output_dir", str(tmp_path / "pictures"),
    )  # fmt: skip
    assert code == 0


def test_a_run_is_repeated_from_its_own_file(
    say: Say, base: str, prompts: str, tmp_path: Path
) -> None:
    arguments = ("distill", "--pretrained_model_name_or_path", base, "--prompts", prompts, *SHORT)
    assert say(*arguments, "--output_dir", str(tmp_path / "one"))[0] == 0
    file = tmp_path / "one" / "config.json"
    again = str(tmp_path / "two")
    assert say("distill", "--config", str(file), "--output_dir", again)[0] == 0
    one, two = (Guide.from_pretrained(tmp_path / n / "guide") for n in ("one", "two"))
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert DistillConfig.load(file).prompts == prompts
