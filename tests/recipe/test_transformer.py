"""The stage ``transformer``: one file from the results of several commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baselines.frontier.results import FrontierEntry, FrontierResult, FrontierRun
from pilotfish.evaluation.results import (
    Agreement,
    GuideSize,
    NegativeModel,
    NegativeResult,
    ResultError,
    Run,
)
from pilotfish.guidance_error import GuidanceError
from recipe.pages import transformer_text
from recipe.transformer import TransformerResult, compose

SIZE = GuideSize("sd3-tiny", 100, 0.01)
RUN = Run("pilotfish evaluate", 0, 10, 4.0, 25, "some machine", {"torch": "2.13.0"})
ERROR = GuidanceError(0.3, {"4": 0.3}, {"0.999": 0.5}, 0.9)


def entry(method: str, refresh: int, steps: int = 25, setting: str = "") -> FrontierEntry:
    gain, passes = 0.9 + refresh / 100, float(steps + refresh)
    return FrontierEntry(
        method, refresh, steps, passes, 0.5, gain, (gain - 0.1, gain + 0.1), 0.9, 0.1, 3.0, 1.1,
        {"8": 1.7}, 10, 0, "pilotfish compare", "another", setting,
    )  # fmt: skip


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    run = FrontierRun(0, 10, 10, 4.0, 25, 50, "", "bfloat16", {}, cost_command="time")
    entries = [
        entry("sd3-tiny", 0), entry("sd3-tiny", 3), entry("sd3-tiny", 3, setting="even"),
        entry("sd3-tiny-8", 2, steps=8), entry("sd3-tiny-8", 0, steps=8), entry("delta-reuse", 5),
        replace(entry("cfg", 50, steps=50), top1=0.8),
    ]  # fmt: skip
    FrontierResult(run, {"sd3": entries}).save(tmp_path / "frontier.json")
    agreement = Agreement(20.0, 0.9, 0.9)
    for k, ratio in ((0, 1.15), (3, 1.05)):
        negative = NegativeModel(ERROR, ERROR, ERROR, ratio, 2.0, 0.2, {"null": agreement})
        run_k = replace(RUN, refresh=k, command=f"evaluate --refresh {k}")
        NegativeResult({"sd3": negative}, SIZE, run_k).save(tmp_path / f"negative-{k}.json")
    return tmp_path


def test_the_file_has_each_model_by_its_passes(parts: Path) -> None:
    found = compose(parts)
    model = found.models["sd3"]
    assert model.gain_kept == {"25": 0.9, "28": 0.93}  # the default places, 25 steps, the guide
    assert model.interval["28"].low == pytest.approx(0.83)
    assert model.negative_ratio == {"25": 1.15, "28": 1.05}
    assert (model.guidance_error.mean, model.cosine) == (0.3, 0.9)
    assert found.run.machines == ["another", "some machine"]
    negatives = [f"evaluate --refresh {k}" for k in (0, 3)]
    assert found.run.commands == ["pilotfish compare", "time", *negatives]
    assert found.cost == {"25": {"8": 1.7}, "28": {"8": 1.7}}
    text = transformer_text(found)
    assert "| kept, 28 passes | 93 % (83–103) |" in text
    assert model.few_steps == {"8": 0.5 / 0.8, "10": 0.5 / 0.8}
    assert "| top-1, 10 passes | 62 % |" in text
    assert "| negative ratio, 25 passes | 1.15 |" in text
    assert "CFG over the guide at batch 8: 1.70 in 25 passes, 1.70 in 28 passes." in text
    found.save(parts / "transformer.json")
    assert TransformerResult.load(parts / "transformer.json") == found


def test_a_part_that_is_missing_is_named(parts: Path) -> None:
    (parts / "negative-3.json").unlink()
    with pytest.raises(ResultError, match=r"negative-3\.json"):
        compose(parts)
