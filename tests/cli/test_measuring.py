"""Measurements as their user meets them: figures, plots, and a sentence where none can be."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tests.evaluation.test_shapes import SMALL

from benchmarks.largest_batch import largest_batches
from benchmarks.shapes import Shape, ShapesResult
from benchmarks.training_memory import around_the_denoiser
from pilotfish import cli
from pilotfish.cli.names import judge
from tests.cli.conftest import Say


def test_the_embedded_judge_says_that_it_knows_emoji_alone() -> None:
    with pytest.warns(UserWarning, match="sd15 is judged by the embedded judge"):
        judge(None, ["base", "sd15"])


@pytest.mark.parametrize("kind", ["full", "agd"])
def test_a_kind_of_guide_is_timed_fresh(
    kind: str, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--batch_sizes", "1", "--num_inference_steps", "2", "--rounds", "1")
    flags = ("--guide", kind, "--pretrained_model_name_or_path", base)
    assert cli.main(["benchmark", *flags, *short]) == 0
    assert f"{kind}: " in capsys.readouterr().out


def test_counting_keeps_what_was_timed_and_adds_the_largest_batch(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.command.SHAPES", {"sd15": Shape(SMALL)})
    file = tmp_path / "shapes.json"
    flags = ("benchmark", "--shape", "sd15", "--batch_sizes", "1", "--output", str(file))
    assert say(*flags, "--rounds", "1")[0] == 0
    timed = ShapesResult.load(file)
    assert say(*flags, "--counted")[0] == 0
    assert ShapesResult.load(file) == timed
    assert timed.shapes["sd15"].cfg_over
    assert say(*flags, "--counted", "--memory", "1", "--precision", "float16")[0] == 0
    found = ShapesResult.load(file).shapes["sd15"]
    around = sum(around_the_denoiser("sd15", torch.float16).values())
    expected = largest_batches(Shape(SMALL), torch.float16, 2**30, around)
    assert found.largest_batch == {"float16, 1 GiB": expected}
    assert replace(found, largest_batch={}) == timed.shapes["sd15"]


def test_another_precision_and_compiled_are_timed_beside_the_first(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.command.SHAPES", {"sd15": Shape(SMALL)})
    torch.compiler.reset()
    quickly = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(UNet2DConditionModel, "compile", quickly)
    file = tmp_path / "shapes.json"
    flags = ("benchmark", "--shape", "sd15", "--batch_sizes", "1", "--output", str(file),
             "--guides", "tiny", "--rounds", "1")  # fmt: skip
    assert say(*flags)[0] == 0
    timed = ShapesResult.load(file).shapes["sd15"]
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    assert say(*flags, "--precision", "bfloat16", "--compile")[0] == 0
    shapes = ShapesResult.load(file).shapes
    assert list(shapes) == ["sd15", "sd15, bfloat16, compiled"]
    assert shapes["sd15"] == timed
    assert shapes["sd15, bfloat16, compiled"].command.startswith("TORCHINDUCTOR_FREEZING=1 pilot")
    assert timed.command.startswith("pilotfish benchmark")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--counted",), "add --shape"),
        (("--train",), "add --shape"),
        (("--output", "shapes.json"), "add --shape"),
        (("--memory", "24"), "add --shape"),
        (("--shape", "sd15", "--memory", "24", "--train"), "without --train"),
        (("--shape", "sd15", "--memory", "0", "--counted"), "--memory must be above 0"),
        (("--guides", "tiny"), "--guides is of full-size"),
        (("--shape", "sd15", "--counted", "--compile"), "--compile is of what is timed"),
        (("--shape", "sd15", "--train", "--compile"), "--compile is of what is timed"),
    ],
)
def test_a_benchmark_refuses_what_would_have_no_effect(
    flags: tuple[str, ...], word: str, say: Say
) -> None:
    code, error = say("benchmark", *flags)
    assert code == 1
    assert word in " ".join(error.split())


def test_a_sweep_of_ones_own_base_draws_a_plot(
    base: str, clip: tuple[Any, Any], names: list[str], say: Say, tmp_path: Path
) -> None:
    for part in clip:
        part.save_pretrained(tmp_path / "judge")
    (tmp_path / "names.txt").write_text("\n".join(names))
    code, error = say(
        "sweep", "--hosts", base, "--judge", str(tmp_path / "judge"), "--samples", "2",
        "--prompts", str(tmp_path / "names.txt"), "--num_inference_steps", "2",
        "--guidance_scales", "1", "4", "--output", str(tmp_path / "out" / "it is.json"),
    )  # fmt: skip
    assert code == 0, error
    found = json.loads((tmp_path / "out" / "it is.json").read_text())
    assert list(found["hosts"]["base"]) == ["1", "4"]
    assert shlex.split(found["run"]["command"])[-1] == str(tmp_path / "out" / "it is.json")
    assert Image.open(tmp_path / "out" / "it is-base.png").width > 300


def test_a_comparison_writes_figures_and_a_plot_and_is_not_done_twice(
    base: str, clip: tuple[Any, Any], names: list[str], say: Say, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for part in clip:
        part.save_pretrained(tmp_path / "judge")
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = [
        "compare", "--quick", "--methods", "tiny", "guidance-interval", "--hosts", base,
        "--judge", str(tmp_path / "judge"), "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    for file in ("train_prompts", "prompts", "held_out_prompts"):
        flags += [f"--{file}", str(tmp_path / "names.txt")]
    code, error = say(*flags)
    assert code == 0, error
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(found["methods"]) == {"tiny", "guidance-interval"}
    assert Image.open(tmp_path / "out" / "pareto-samples.png").size[0] > 300
    monkeypatch.setattr("baselines.comparison.comparison.distill", pytest.fail)
    assert say(*flags, "--output", str(tmp_path / "again.json"))[0] == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found
    code, error = say(*flags, "--seed", "7")
    assert code == 1
    assert "other settings" in error
    (tmp_path / "names.txt").write_text("\n".join([*names, "another"]))
    code, error = say(*flags)
    assert code == 1
    assert "other settings" in error, "the same path, but it holds other prompts by now"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--hosts", "fluent"), "fluent is a fine-tune; the first host is the base"),
        (("--methods", "telepathy"), "no method telepathy"),
        (("--guidance_scale", "1"), "no gain to keep"),
    ],
)
def test_a_comparison_that_cannot_be_says_why(
    flags: tuple[str, ...], sentence: str, say: Say, tmp_path: Path
) -> None:
    where = ("--output_dir", str(tmp_path / "out"))
    code, error = say("compare", "--quick", "--methods", "guidance-interval", *where, *flags)
    assert code in (1, 2)
    assert sentence in " ".join(error.split())
