from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pilotfish.evaluation.results import (
    Interval,
    PartialResults,
    Result,
    ResultError,
    Scores,
    machine,
    versions,
)
from pilotfish.evaluation.tables import result_table


def test_json_comes_back_the_same(result: Result, tmp_path: Path) -> None:
    again = Result.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert again.models["base"] == result.models["base"]
    assert (again.guide, again.cost, again.run) == (result.guide, result.cost, result.run)
    result.save(tmp_path / "deep" / "guide.json")
    assert Result.load(tmp_path / "deep" / "guide.json").to_json() == result.to_json()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["guide.json"]


def test_the_shape_of_the_json(result: Result) -> None:
    written = json.loads(result.to_json())
    assert set(written) == {"models", "guide", "cost", "run"}
    model = written["models"]["base"]
    assert set(model["guidance_error"]) == {"mean", "by_w", "by_time", "cosine"}
    assert set(model["scores"]["cfg"]) == {"top1", "top5", "cosine", "fd_clip"}
    assert set(model["agreement"]["guided"]) == {"psnr", "ssim", "cosine"}
    assert {"latent_mse_ratio", "gain_kept", "gain_kept_cosine"} < set(model)
    assert set(model["gain_kept_interval"]) == {"low", "high"}
    assert set(written["guide"]) == {"parameters", "share", "name"}
    assert {"cfg_over_guided", "cfg_over_none", "flops", "passes"} < set(written["cost"])


@pytest.mark.parametrize(
    ("refresh", "words"),
    [
        (None, "both passes in the ratio of each guide"),
        (0, "one pass in each step of the guide"),
        (3, "both passes in 3 of the guide's steps"),
        (0.12, "both passes in 12% of the guide's steps"),
        ([0, 8], "both passes in the steps 0, 8"),
    ],
)
def test_the_steps_with_both_passes_in_words(result: Result, refresh: Any, words: str) -> None:
    assert dataclasses.replace(result.run, refresh=refresh).refreshes == words


def test_what_is_not_a_number_is_null(result: Result) -> None:
    text = result.to_json()
    assert "NaN" not in text
    assert json.loads(text)["models"]["watercolour"]["scores"]["cfg"]["fd_clip"] is None
    again = Result.from_json(text).models["watercolour"]
    assert math.isnan(again.scores["cfg"].fd_clip)


def test_a_save_that_fails_keeps_the_old_file(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "guide.json"
    result.save(path)
    kept = path.read_text()

    def full(_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    other = dataclasses.replace(result, models={})
    with pytest.raises(OSError, match="no space"):
        other.save(path)
    assert path.read_text() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["guide.json"]


def broken(result: Result, *path: str, to: Any = None) -> str:
    values = json.loads(result.to_json())
    place = values
    for name in path[:-1]:
        place = place[name]
    if to is None:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(values)


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [(("cost",), None, "cost: Field required"),
     (("run", "seed"), "one", "run.seed: Input should be a valid integer"),
     (("run", "seed"), True, "run.seed: Input should be a valid integer"),
     (("models", "base", "gain_kept"), "most", "models.base.gain_kept: Input should be a valid nu"),
     (("models", "base", "wings"), 2, "models.base.wings: Unexpected"),
     (("models", "base", "guidance_error", "wings"), 2, "error.wings: Unexpected"),
     (("models",), [1], "models: Input should be an object"),
     (("guide",), 3, "guide: Input should be an object")],
)  # fmt: skip
def test_a_broken_result_names_the_field(
    result: Result, path: tuple[str, ...], to: Any, message: str
) -> None:
    with pytest.raises(ResultError, match=message):
        Result.from_json(broken(result, *path, to=to))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no result could be read from"):
        Result.load(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text('{"models": {')
    with pytest.raises(ResultError, match="no JSON"):
        Result.load(tmp_path / "cut.json")


def test_finished_parts_are_read_and_not_measured_again(tmp_path: Path) -> None:
    file, scores = tmp_path / "parts.json", Scores(0.5, 0.6, 0.1, math.nan)
    assert PartialResults(file).get(Scores, {"w": 1}, lambda: scores) is scores
    again = PartialResults(file)
    found = again.get(Scores, {"w": 1}, pytest.fail)
    assert (found.top1, math.isnan(found.fd_clip)) == (0.5, True)
    assert again.get(Scores, {"w": 2}, lambda: scores) is scores, "another fact"
    interval = Interval(0.0, 1.0)
    assert again.get(Interval, {"w": 1}, lambda: interval) is interval, "another type"


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_parts_that_cannot_be_read_are_measured(tmp_path: Path, text: str | None) -> None:
    file, scores = tmp_path / "parts.json", Scores(0.5, 0.6, 0.1, 2.0)
    PartialResults(file).get(Scores, {}, lambda: scores)
    file.write_text(text or file.read_text().replace("0.5", '"much"'))
    assert PartialResults(file).get(Scores, {}, lambda: scores) is scores


def test_weights_are_facts(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    parts = PartialResults(tmp_path / "parts.json")
    before = parts.checksums({"layer": layer})
    assert before == parts.checksums({"layer": layer})
    with torch.no_grad():
        layer.bias.add_(1)
    assert parts.checksums({"layer": layer}) != before
    assert PartialResults(None).checksums({"layer": layer}) == {}


def test_the_table_shows_every_model(result: Result, exported: Callable[[Any], str]) -> None:
    text = exported(result_table(result))
    for word in ("base", "watercolour", "0.300", "90 %", "1.75×", "67,321", "1.02 GFLOP", "–"):
        assert word in text


@pytest.fixture
def exported() -> Callable[[Any], str]:
    def export(table: Any) -> str:
        console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
        console.print(table)
        return console.export_text()

    return export


def test_the_machine_has_no_name_and_no_path() -> None:
    assert "thread" in machine()
    assert "/" not in machine().replace("(R)/", "")
    assert socket.gethostname() not in machine()
    assert {"python", "torch", "diffusers"} < set(versions())
