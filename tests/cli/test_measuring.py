"""Measurements as their user meets them: figures, plots, and a sentence where none can be."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pilotfish.cli.names import judge
from tests.cli.conftest import Say


def test_the_embedded_judge_says_that_it_knows_emoji_alone() -> None:
    with pytest.warns(UserWarning, match="sd15 is judged by the embedded judge"):
        judge(None, ["base", "sd15"])


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
