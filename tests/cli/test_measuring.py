"""Measurements as their user meets them: figures, plots, and a sentence where none can be."""

from __future__ import annotations

import json
import shlex
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pilotfish import cli
from pilotfish.cli.names import named_methods, open_scorer, split_name
from pilotfish.guides import Guide
from tests.cli.conftest import Say


def test_the_bundled_scorer_warns_of_other_models() -> None:
    with pytest.warns(UserWarning, match="sd15 is scored by the bundled CLIP"):
        open_scorer(None, ["base", "sd15"])


@pytest.mark.parametrize(
    ("text", "name", "guide"),
    [
        ("tiny", "tiny", "tiny"), ("few=tiny-8", "few", "tiny-8"),
        ("runs/lr=3/guide", "guide", "runs/lr=3/guide"),
        ("few=runs/lr=3/guide", "few", "runs/lr=3/guide"),
        ("owner/guide", "guide", "owner/guide"), ("few=owner/guide", "few", "owner/guide"),
        (r"runs\lr=3\guide", r"runs\lr=3\guide", r"runs\lr=3\guide"),
    ],
)  # fmt: skip
def test_a_name_stands_before_the_first_equals_sign(text: str, name: str, guide: str) -> None:
    assert split_name(text) == (name, guide)


def test_a_folder_with_an_equals_sign_is_one(
    guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("lr=3", "runs/lr=3/guide"):
        Guide.from_pretrained(guide).save_pretrained(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    assert list(named_methods(["lr=3", "runs/lr=3/guide"])) == ["lr=3", "guide"]
    methods = named_methods(["few=lr=3", "few=runs/lr=3/guide", "guidance-interval"])
    assert {name: len(guides) for name, guides in methods.items()} == {
        "few": 2, "guidance-interval": 1,
    }  # fmt: skip


@pytest.fixture
def own(
    base: str, guide: str, clip: tuple[Any, Any], names: list[str], tmp_path: Path
) -> list[str]:
    """Flags for a base, guide, scorer and prompts of one's own."""
    for part in clip:
        part.save_pretrained(tmp_path / "scorer")
    (tmp_path / "names.txt").write_text("\n".join(names))
    file = str(tmp_path / "names.txt")
    return ["evaluate", "--models", base, "--guide", guide, "--prompts", file, "--scorer",
            str(tmp_path / "scorer"), "--validation_prompts", file, "--samples", "2",
            "--num_inference_steps", "2", "--rounds", "1"]  # fmt: skip


def test_by_guidance_scale_and_by_steps_a_plot_is_drawn(
    own: list[str], say: Say, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "it is.json"
    code, error = say(*own, "--guidance_scales", "1", "4", "--output", str(output))
    assert code == 0, error
    found = json.loads(output.read_text())
    assert {m: list(points) for m, points in found["models"]["base"].items()} == {
        "none": ["1"], "cfg": ["1", "4"], "guide": ["1", "4"],
    }  # fmt: skip
    assert shlex.split(found["run"]["command"])[-1] == str(output)
    assert Image.open(tmp_path / "out" / "it is-base.png").width > 300
    code, error = say(*own, "--steps", "2", "--output", str(tmp_path / "steps.json"))
    assert code == 0, error
    assert list(json.loads((tmp_path / "steps.json").read_text())["wall_clock"]["cfg"]) == ["2"]


def test_a_base_that_has_no_guide_yet_is_measured_by_guidance_scale(
    own: list[str], guide: str, say: Say, tmp_path: Path
) -> None:
    without = [flag for flag in own if flag not in ("--guide", guide)]
    output = tmp_path / "scales.json"
    code, error = say(*without, "--guidance_scales", "4", "--output", str(output))
    assert code == 0, error
    assert list(json.loads(output.read_text())["models"]["base"]) == ["none", "cfg"]


def test_a_result_says_how_many_steps_were_refreshed(
    own: list[str], say: Say, tmp_path: Path
) -> None:
    output = tmp_path / "result.json"
    code, error = say(*own, "--refresh", "1", "--output", str(output))
    assert code == 0, error
    found = json.loads(output.read_text())
    assert found["run"]["refresh"] == 1
    assert found["cost"]["passes"] == {"none": 2.0, "cfg": 4.0, "guided": 3.0}


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_a_result_is_saved_and_shown_on_any_terminal(
    encoding: str, own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables hold characters that ASCII and cp1251 have not."""
    output, terminal = tmp_path / "result.json", BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(terminal, encoding=encoding))
    assert cli.main([*own, "--output", str(output), "--dtype", "bfloat16"]) == 0
    sys.stdout.flush()
    assert json.loads(output.read_text())["run"]["dtype"] == "bfloat16"
    assert b"latent MSE" in terminal.getvalue()
    assert Image.open(tmp_path / "result-guidance-error.png").width > 300
    assert not list(tmp_path.glob("*.unfinished"))


def test_models_that_come_in_a_variant_alone(
    own: list[str], make_pipe: Any, say: Say, tmp_path: Path
) -> None:
    make_pipe("epsilon").save_pretrained(tmp_path / "base", variant="fp16")
    for file in (tmp_path / "base").glob("*/*.safetensors"):
        if ".fp16." not in file.name:
            file.unlink()
    options = ("--guidance_scales", "4", "--output", str(tmp_path / "result.json"))
    code, error = say(*own, *options)
    assert code == 1
    assert "it holds the variant fp16" in error
    assert say(*own, *options, "--variant", "fp16")[0] == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--steps", "4", "--negative_prompts"), "--steps and --negative_prompts cannot be combi"),
        (("--guide", "tiny", "tiny-8"), "2 guides, but without --steps"),
        (("--steps", "4", "--grid", "x.png"), "--grid has no effect with --steps"),
        (("--steps", "4", "--rounds", "0"), "at least one round is needed, not 0"),
        (("--refresh", "-1"), "refresh must be a number of steps, at least 0"),
        (("--guidance_scales", "1", "--samples", "0"), "at least two samples"),
    ],
)
def test_options_that_exclude_one_another(flags: tuple[str, ...], sentence: str, say: Say) -> None:
    code, error = say("evaluate", *flags)
    assert code == 1
    assert sentence in " ".join(error.split())
