"""Two real processes measure what one measures, each drawing a part of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pilotfish.evaluation import processes as processes_module
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.processes import (
    gather_objects,
    gather_shares,
    is_main,
    on_main,
    process,
    share,
    total_batch_size,
)
from pilotfish.guides import Guide

SEVEN = ("--samples", "7", "--num_inference_steps", "3", "--seed", "2")
PROMPTS = ("--prompts", "names.txt", "--validation_prompts", "names.txt", "--scorer", "scorer")
MODEL = ("--models", "./base", "--reference_images", "real")
COMMANDS = {
    "evaluate": (*MODEL, *SEVEN, "--batch_size", "2", "--rounds", "1", "--grid", "grid.png"),
    "evaluate --negative_prompts": (
        "--negative_prompts", *MODEL, "--num_inference_steps", "3", "--batch_size", "2",
    ),
    "evaluate --steps": (
        "--steps", "2", "3", "--guide", "guide", "guidance-interval", *MODEL, *SEVEN,
        "--batch_size", "2", "--rounds", "1",
    ),
}  # fmt: skip
TIMES = ("cost", "wall_clock", "command")


def run(folder: Path, processes: int, name: str, *arguments: str) -> Any:
    """The command on so many processes; what it wrote."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    given = (*PROMPTS, *(() if "--guide" in arguments else ("--guide", "guide")), *arguments)
    command = [*(launcher if processes > 1 else []), "-m", "pilotfish", name, *given]
    done = subprocess.run(
        [sys.executable, *command, "--output", f"{processes}.json"], cwd=folder, check=False,
        capture_output=True, text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"saved {processes}.json") == 1
    return json.loads((folder / f"{processes}.json").read_text())


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """Every figure by its place, but times."""
    if not isinstance(value, dict):
        return {where: value}
    parts = (flat(v, f"{where}.{k}") for k, v in value.items() if k not in TIMES)
    return {place: figure for part in parts for place, figure in part.items()}


@pytest.fixture
def folder(
    make_pipe: Callable[[str], Any], moved: Guide, scorer: Scorer, clip: Any, names: list[str],
    real: Path, tmp_path: Path,
) -> Path:  # fmt: skip
    """All that the commands name."""
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    moved.save_pretrained(tmp_path / "guide")
    for part in clip:
        part.save_pretrained(tmp_path / "scorer")
    (tmp_path / "names.txt").write_text("\n".join(names))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_measure_what_one_measures(name: str, folder: Path) -> None:
    one, two = (flat(run(folder, n, name.split()[0], *COMMANDS[name])) for n in (1, 2))
    assert one.keys() == two.keys()
    figures = [place for place, figure in one.items() if isinstance(figure, float)]
    assert len(figures) > 8
    for place, figure in one.items():
        if place in figures:
            assert two[place] == pytest.approx(figure, rel=1e-3, abs=1e-5), place
        else:
            assert two[place] == figure, place
    assert not list(folder.glob("*.unfinished"))


@pytest.mark.parametrize(("count", "processes"), [(1, 3), (7, 2), (8, 4), (5, 4)])
def test_the_shares_one_after_another_are_all_there_is(
    count: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    for i in range(processes):
        state = SimpleNamespace(num_processes=processes, process_index=i)
        monkeypatch.setattr(processes_module, "_state", lambda state=state: state)
        shares.append(share(count))
    assert len({len(one) for one in shares}) == 1
    assert len(shares[0]) < count / processes + 1
    assert list(chain(*shares))[:count] == list(range(count))


def test_one_process_does_all_of_it() -> None:
    assert is_main()
    assert process() == (0, 1)
    assert (total_batch_size(4), share(3), gather_objects(5)) == (4, [0, 1, 2], [5])
    assert on_main(lambda: "read") == "read"
    some = torch.rand(2, 3)
    (one,) = gather_shares(2, some)
    assert one is some
