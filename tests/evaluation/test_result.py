from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pilotfish.evaluation.machine import machine, versions
from pilotfish.evaluation.result import Result
from pilotfish.evaluation.saved import ResultError
from pilotfish.evaluation.table import result_table


def test_json_comes_back_the_same(result: Result) -> None:
    again = Result.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert again.hosts["base"] == result.hosts["base"]
    assert (again.guide, again.cost, again.run) == (result.guide, result.cost, result.run)
    assert math.isnan(again.hosts["watercolour"].cfg.fd_judge)


def test_the_shape_of_the_json(result: Result) -> None:
    written = json.loads(result.to_json())
    assert set(written) == {"hosts", "guide", "cost", "run"}
    host = written["hosts"]["base"]
    assert {"mean", "by_w", "by_time"} == set(host["guidance_error"])
    for way in ("none", "cfg", "guided"):
        assert set(host[way]) == {"prompt_score", "top5", "cosine", "fd_judge"}
    for way in ("none", "guided"):
        assert set(host["agreement"][way]) == {"psnr", "ssim", "cosine"}
    assert {"latent_mse_ratio", "gain_kept", "gain_kept_cosine"} < set(host)
    assert set(host["gain_kept_interval"]) == {"low", "high"}
    assert set(written["guide"]) == {"parameters", "share", "name"}
    assert {"cfg_over_guided", "cfg_over_plain", "flops", "passes"} < set(written["cost"])
    assert set(written["run"]) == {
        "command", "seed", "samples", "guidance_scale", "num_inference_steps", "machine",
        "versions",
    }  # fmt: skip


def test_what_is_not_a_number_is_null(result: Result) -> None:
    text = result.to_json()
    assert "NaN" not in text
    assert json.loads(text)["hosts"]["watercolour"]["cfg"]["fd_judge"] is None


def test_it_is_saved_and_loaded(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "deep" / "guide.json")
    assert Result.load(tmp_path / "deep" / "guide.json").to_json() == result.to_json()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["guide.json"]


def test_a_save_that_fails_keeps_what_was_there(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "guide.json"
    result.save(path)
    kept = path.read_text()

    def full(_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    other = dataclasses.replace(result, hosts={})
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
    [(("cost",), None, "result lacks cost"),
     (("run", "seed"), "one", "result.run.seed must be of type int"),
     (("run", "seed"), True, "result.run.seed must be of type int"),
     (("hosts", "base", "gain_kept"), "most", "result.hosts.base.gain_kept must be a number"),
     (("hosts", "base", "wings"), 2, "result.hosts.base has unknown fields: wings"),
     (("hosts",), [1], "result.hosts must be an object"),
     (("guide",), 3, "result.guide must be an object")],
)  # fmt: skip
def test_a_broken_result_names_the_field(
    result: Result, path: tuple[str, ...], to: Any, message: str
) -> None:
    with pytest.raises(ResultError, match=message):
        Result.from_json(broken(result, *path, to=to))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no result could be read from"):
        Result.load(tmp_path / "gone.json")
    (tmp_path / "cut.json").write_text('{"hosts": {')
    with pytest.raises(ResultError, match="no JSON"):
        Result.load(tmp_path / "cut.json")


def test_the_table_shows_every_host(result: Result) -> None:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: PTH123, SIM115
    console.print(result_table(result))
    text = console.export_text()
    for word in ("base", "watercolour", "0.300", "90 %", "1.75×", "67,321", "1.02 GFLOP", "–"):
        assert word in text


def test_the_machine_has_no_name_and_no_path() -> None:
    import socket

    assert "thread" in machine()
    assert "/" not in machine().replace("(R)/", "")
    assert socket.gethostname() not in machine()
    assert {"python", "torch", "diffusers"} < set(versions())
