"""``pilotfish benchmark``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from benchmarks.measure import ShapesResult
from pilotfish import cli
from tests.benchmarks.small import SMALL

MODES = ("none", "cfg", "tiny", "full")


@pytest.fixture
def base(make_pipe: Callable[[str], Any], tmp_path: Path) -> str:
    """A pipeline's folder, of one that does not predict what most do."""
    make_pipe("v_prediction").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small denoiser in the place of SD 1.5's."""
    monkeypatch.setattr("benchmarks.command.SHAPES", {"sd15": SMALL})


@pytest.mark.parametrize("guide_type", ["full", "agd"])
def test_a_fresh_guide_is_timed(
    guide_type: str, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--batch_sizes", "1", "--num_inference_steps", "2", "--rounds", "1")
    assert cli.main(["benchmark", "--guide_type", guide_type, "--models", base, *short]) == 0
    assert f"fresh {guide_type}: " in capsys.readouterr().out


def test_operators_of_a_pipeline_are_listed(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", "--guide_type", "tiny", "--models", base, "--operators"]) == 0
    assert "fresh tiny, each step: aten." in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_counting_keeps_what_was_timed_and_adds_largest_batch_and_operators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.command.largest_batches", lambda *_: dict.fromkeys(MODES, 3))
    file = tmp_path / "shapes.json"
    flags = ["benchmark", "--shape", "sd15", "--batch_sizes", "1", "--guide_type", "tiny",
             "--output", str(file)]  # fmt: skip
    assert cli.main([*flags, "--rounds", "1"]) == 0
    timed = ShapesResult.load(file)
    assert cli.main([*flags, "--count_only"]) == 0
    assert ShapesResult.load(file) == timed
    assert timed.shapes["sd15"].speedup
    more = ("--count_only", "--memory", "0.6", "--dtype", "float16")
    assert cli.main([*flags, *more]) == 0
    assert cli.main([*flags, "--operators"]) == 0
    found = ShapesResult.load(file).shapes["sd15"]
    assert found.largest_batch == {"float16, 0.6 GiB": dict.fromkeys(MODES, 3)}
    assert set(found.operators) == {"tiny"}
    assert replace(found, largest_batch={}, operators={}) == timed.shapes["sd15"]


@pytest.mark.usefixtures("small")
def test_another_precision_and_compilation_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: None)  # takes long
    file = tmp_path / "shapes.json"
    flags = ["benchmark", "--shape", "sd15", "--batch_sizes", "1", "--output", str(file),
             "--guide_type", "tiny", "--rounds", "1"]  # fmt: skip
    assert cli.main(flags) == 0
    timed = ShapesResult.load(file).shapes["sd15"]
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    assert cli.main([*flags, "--dtype", "bfloat16", "--compile"]) == 0
    shapes = ShapesResult.load(file).shapes
    assert list(shapes) == ["sd15", "sd15, bfloat16, compiled"]
    assert shapes["sd15"] == timed
    assert shapes["sd15, bfloat16, compiled"].command.startswith("TORCHINDUCTOR_FREEZING=1 pilot")
    assert timed.command.startswith("pilotfish benchmark")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--count_only",), "--count_only needs --shape"),
        (("--train",), "--train needs --shape"),
        (("--output", "shapes.json"), "--output needs --shape"),
        (("--memory", "24"), "--memory needs --shape"),
        (("--shape", "sd15", "--memory", "24", "--train"), "no effect with --train"),
        (("--shape", "sd15", "--memory", "0", "--count_only"), "--memory must be above 0"),
        (("--shape", "sd15", "--count_only", "--compile"), "--compile has no effect"),
        (("--shape", "sd15", "--train", "--compile"), "--compile has no effect"),
        (("--shape", "sd15", "--train", "--operators"), "--operators cannot be combined"),
        (
            ("--shape", "sd15", "--guide_type", "agd"),
            "agd is unknown here; available: tiny, tiny-cached, tiny-sampled",
        ),
        (("--shape", "sana", "--guide_type", "full"), "no full guide fits sana"),
        (("--shape", "sana", "--train", "--weights", "fp8"), "--weights needs --train and"),
        (("--side", "256"), "--side needs --shape"),
        (("--guide_type", "telepathy"), "--guide_type telepathy is unknown here"),
        (("--guide_type", "tiny", "full"), "one type without --shape"),
    ],
)
def test_flags_without_effect_are_refused(
    flags: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["benchmark", *flags])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert problem in " ".join(capsys.readouterr().err.split())
