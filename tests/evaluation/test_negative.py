"""Negative prompts under a guide, against those under CFG."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.negative import NegativeResult, measure_negatives, negative_host, pairs
from pilotfish.evaluation.table import negatives_table
from pilotfish.guides import Guide

STEPS: dict[str, Any] = {"num_inference_steps": 2}


def measure(
    hosts: dict[str, Host], judge: Judge, names: list[str], guide: Guide, **more: Any
) -> NegativeResult:
    return measure_negatives(
        hosts, guide, names, guide_name="tiny", command="pilotfish negatives", judge=judge,
        batch_size=2, **STEPS, **more,
    )  # fmt: skip


def test_every_prompt_has_another_as_its_negative() -> None:
    assert pairs(["a", "b", "c", "d", "e"]) == ["c", "d", "e", "a", "b"]
    for prompts in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="two that differ"):
            pairs(prompts)


def test_each_host_is_measured_told_and_ignoring(
    hosts: dict[str, Host], judge: Judge, names: list[str], moved: Guide, tmp_path: Path
) -> None:
    found = measure(hosts, judge, names, moved)
    assert list(found.hosts) == list(hosts)
    for host in found.hosts.values():
        assert host.told.mean != host.ignoring.mean
        assert host.ratio == host.told.mean / host.null.mean
        assert host.ratio_ignoring == host.ignoring.mean / host.null.mean
        assert 0 < host.latent_mse_ratio < math.inf
        assert host.agreement["told"] != host.agreement["ignoring"]
    found.save(tmp_path / "negative.json")
    assert NegativeResult.load(tmp_path / "negative.json").to_json() == found.to_json()
    assert negatives_table(found).row_count == len(hosts)


class Stopped(Exception):
    pass


def test_goes_on_from_the_hosts_that_are_measured(
    make_pipe: Callable[[], Any], judge: Judge, names: list[str], moved: Guide, tmp_path: Path
) -> None:
    file, told = tmp_path / "unfinished.json", []

    def fine_tune() -> Any:
        pipe = make_pipe()
        with torch.no_grad():
            next(pipe.unet.parameters()).mul_(1.1)
        return pipe

    hosts = {"base": Host(make_pipe), "watercolour": Host(fine_tune)}

    def stopping(what: str, done: int, total: int) -> None:
        if what.startswith("watercolour: pictures"):
            raise Stopped

    def noting(what: str, done: int, total: int) -> None:
        told.append(what)

    with pytest.raises(Stopped):
        measure(hosts, judge, names, moved, unfinished=file, progress=stopping)
    resumed = measure(hosts, judge, names, moved, unfinished=file, progress=noting)
    assert told
    assert not any(what.startswith("base") for what in told)
    assert resumed.to_json() == measure(hosts, judge, names, moved).to_json()
    told.clear()
    with torch.no_grad():
        next(moved.parameters()).mul_(1.5)
    measure(hosts, judge, names, moved, unfinished=file, progress=noting)
    assert any(what.startswith("base") for what in told), "another guide, yet nothing measured"


def test_told_the_null_prompt_nothing_is_ignored(
    pipe: Any, judge: Judge, names: list[str], moved: Guide
) -> None:
    host = negative_host(pipe, moved, names[:2], ["", ""], judge, **STEPS)
    assert host.null == host.told == host.ignoring
    assert host.ratio == 1
    assert host.agreement["told"] == host.agreement["ignoring"]


def test_bad_input_is_named(
    hosts: dict[str, Host], judge: Judge, names: list[str], moved: Guide
) -> None:
    with pytest.raises(ValueError, match="there is no host"):
        measure({}, judge, names, moved)
    with pytest.raises(ValueError, match="does nothing at w = 1"):
        measure_negatives(hosts, moved, names, guide_name="", command="", guidance_scale=1.0)
