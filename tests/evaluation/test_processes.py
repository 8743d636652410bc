"""Two real processes measure what one measures, each drawing a part of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pilotfish import cli
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
from tests import forked

SEVEN = ("--samples", "7", "--num_inference_steps", "3", "--seed", "2")
PROMPTS = ("--prompts", "names.txt", "--validation_prompts", "names.txt", "--scorer", "scorer")
MODEL = ("--models", "./base", "--reference_images", "real")
COMMANDS = {
    "result": (*SEVEN, "--rounds", "1", "--grid", "grid.png"),
    "negatives": ("--negative_prompts", "--num_inference_steps", "3"),
    "steps": ("--steps", "2", "3", *SEVEN, "--rounds", "1"),
}
TIMES = ("cost", "wall_clock", "command")
RUNNER = """
import json, sys
from pilotfish import cli
for arguments in json.loads(sys.argv[1]):
    assert cli.main(arguments) == 0
"""


def evaluations(name: str) -> list[list[str]]:
    """Command lines that write to a folder."""
    same = ["--batch_size", "2", "--guide", "guide", *PROMPTS, *MODEL]
    return [
        ["evaluate", *same, *flags, "--output", f"{name}/{key}.json"]
        for key, flags in COMMANDS.items()
    ]


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


@forked.NEEDED
@pytest.mark.slow
def test_two_processes_measure_what_one_measures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "runner.py").write_text(RUNNER)
    log = folder / "log"
    run = forked.Forked(
        json.dumps(evaluations("two")), log=log, script=folder / "runner.py", folder=folder,
        processes=2,
    )  # fmt: skip
    code, shown = run.wait(), log.read_text()
    assert code == 0, shown[-3000:]
    monkeypatch.chdir(folder)
    for arguments in evaluations("one"):
        assert cli.main(arguments) == 0
    for key in COMMANDS:
        assert shown.count(f"saved two/{key}.json") == 1
        one, two = (flat(json.loads(Path(f"{n}/{key}.json").read_text())) for n in ("one", "two"))
        assert one.keys() == two.keys()
        figures = [place for place, figure in one.items() if isinstance(figure, float)]
        assert len(figures) > 8
        for place in figures:
            assert two[place] == pytest.approx(one[place], rel=1e-3, abs=1e-5), (key, place)
        assert {p: f for p, f in two.items() if p not in figures} == {
            p: f for p, f in one.items() if p not in figures
        }
    assert not list(folder.rglob("*.unfinished"))


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
