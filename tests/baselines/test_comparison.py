"""The comparison as its user meets it: equal terms, nothing done twice, nothing lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baselines.comparison import comparison
from baselines.comparison.bench import Bench, Measurement
from baselines.comparison.comparison import Comparing
from baselines.comparison.methods import DEFAULT, METHODS
from baselines.comparison.plan import Plan
from baselines.comparison.plots import pareto
from baselines.comparison.result import Comparison
from baselines.comparison.table import HEADINGS, comparison_markdown, comparison_table, ranked
from baselines.training_free import GuidanceInterval
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelSource
from pilotfish.evaluation.plots import png
from pilotfish.guides import TinyGuide
from pilotfish.training.config import ConfigError

STEPS = 3
PLAN = Plan(
    methods=("tiny", "dice", "guidance-interval"), max_train_steps=4, train_batch_size=4,
    samples=4, held_out=2, num_inference_steps=STEPS, rounds=1, equal_seconds=False,
)  # fmt: skip


@pytest.fixture
def how(names: list[str]) -> Measurement:
    return Measurement(names, ["cat", "a"], 4, 4.0, STEPS, seed=0, batch_size=3)


@pytest.fixture
def start(
    make_pipe: Callable[[str], Any], how: Measurement, scorer: Scorer, names: list[str],
    real: Path, tmp_path: Path,
) -> Callable[..., Comparing]:  # fmt: skip
    """A comparison in a folder, on a base and a fine-tune that is not one."""
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(names))
    training = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "prompts": str(tmp_path / "prompts.txt"),
        "validation_prompts": str(tmp_path / "prompts.txt"),
        "pool": 8, "replay_capacity": 8,
        "trajectory_steps_min": 2, "trajectory_steps_max": 4,
    }  # fmt: skip
    hosts = {
        "base": ModelSource(lambda: make_pipe("epsilon"), real),
        "other": ModelSource(lambda: make_pipe()),
    }

    def make(folder: str = "run", plan: Plan = PLAN) -> Comparing:
        return Comparing(
            plan, hosts, how, scorer, tmp_path / folder, training=training,
            command="pilotfish compare", notice=lambda line: None,
        )  # fmt: skip

    return make


def test_what_is_cfg_keeps_all_of_it(
    make_pipe: Callable[[str], Any], how: Measurement, scorer: Scorer, real: Path
) -> None:
    bench = Bench(ModelSource(lambda: make_pipe("epsilon"), real), how, scorer)
    found = bench.measure(GuidanceInterval(0, 1000))
    assert found.latent_mse_ratio == 0
    assert found.scores == bench.cfg.scores
    assert found.passes == 2 * STEPS
    assert math.isnan(found.guidance_error)
    assert found.gain_kept_cosine == pytest.approx(1)


def test_a_fresh_guide_keeps_nothing(
    make_pipe: Callable[[str], Any], how: Measurement, scorer: Scorer, real: Path
) -> None:
    bench = Bench(ModelSource(lambda: make_pipe("epsilon"), real), how, scorer)
    found = bench.measure(TinyGuide.for_denoiser(bench.pipe.unet, "epsilon"))
    assert found.latent_mse_ratio == pytest.approx(1, abs=1e-3)
    assert found.guidance_error == pytest.approx(1, abs=1e-3)
    assert found.gain_kept_cosine == pytest.approx(0, abs=1e-2)
    assert found.passes == STEPS


def test_a_comparison_from_end_to_end(start: Callable[..., Comparing], tmp_path: Path) -> None:
    found = start().run()
    assert list(found.methods) == list(PLAN.methods)
    assert found.default == DEFAULT
    for name, method in found.methods.items():
        trained = METHODS[name].rule is None
        assert set(method.runs) == {"samples-0" if trained else "free"}
        (run,) = method.runs.values()
        assert set(run.hosts) == {"base", "other"}
        assert (method.parameters > 0) == (run.training.seconds > 0) == trained
        assert run.training.samples == (16 if trained else 0)
        assert method.cost.cfg_over_method > 0
    interval, tiny = (found.methods[n].cost for n in ("guidance-interval", "tiny"))
    assert STEPS < interval.passes < 2 * STEPS
    assert tiny.passes == STEPS
    assert 1 < tiny.flops_over_plain < 1.5
    assert Comparison.load(tmp_path / "run" / "compare.json").to_json() == found.to_json()


def scores(found: Comparison) -> str:
    """Everything that does not depend on the clock."""
    plain = json.loads(found.to_json())["methods"]
    return json.dumps({
        name: {key: run["hosts"] for key, run in method["runs"].items()}
        for name, method in plain.items()
    })  # fmt: skip


@pytest.mark.parametrize("after", [1, 3, 5])
def test_cut_off_anywhere_it_ends_with_the_same_figures(
    start: Callable[..., Comparing], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole, count, save = start("whole").run(), [0], Comparison.save

    class CutOffError(Exception):
        pass

    def cut(self: Comparison, path: str | Path) -> None:
        save(self, path)
        count[0] += 1
        if count[0] == after:
            raise CutOffError

    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "save", cut)
        with pytest.raises(CutOffError):
            start("cut").run()
    assert scores(start("cut").run()) == scores(whole)


def test_a_finished_comparison_does_nothing_again(
    start: Callable[..., Comparing], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start().run()
    for name in ("distill", "Bench", "take_turns"):
        monkeypatch.setattr(comparison, name, pytest.fail)
    assert start().run().to_json() == whole.to_json()


def test_equal_seconds_are_those_of_the_default(
    start: Callable[..., Comparing], tmp_path: Path
) -> None:
    plan = replace(PLAN, methods=("tiny", "dice"), equal_seconds=True)
    found = start(plan=plan).run()
    assert not (tmp_path / "run" / "tiny" / "seconds-0").exists()
    assert found.budgets == ["samples", "seconds"]
    tiny, dice = (found.methods[n].runs for n in plan.methods)
    assert tiny["seconds-0"] == tiny["samples-0"], "the same guide, trained and measured once"
    pace = dice["samples-0"].training.seconds / PLAN.max_train_steps
    wanted = max(1, round(tiny["samples-0"].training.seconds / pace))
    assert dice["seconds-0"].training.steps == wanted


@pytest.mark.parametrize(
    "less", [{"equal_seconds": False}, {"methods": ("tiny",)}, {"seeds": (1,)}]
)
def test_stopped_and_gone_on_with_less_it_shows_what_there_is(
    start: Callable[..., Comparing], monkeypatch: pytest.MonkeyPatch, less: dict[str, Any]
) -> None:
    plan = replace(PLAN, methods=("tiny", "dice"), equal_seconds=True, seeds=(0, 1))

    def stopped(self: Comparing, host: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Comparing, "_measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            start(plan=plan).run()
    fewer = replace(plan, **{"equal_seconds": False} | less)
    found = start(plan=fewer).run()
    assert found.methods["dice"].runs.keys() >= {"samples-0", "samples-1", "seconds-0"}
    assert found.budgets == ["samples"]
    assert set(ranked(found, "samples")) == set(fewer.methods)
    assert comparison_table(found, "samples").row_count == len(fewer.methods)
    assert png(pareto(found, "samples")).startswith(b"\x89PNG")
    whole = start(plan=plan).run()
    assert whole.budgets == ["samples", "seconds"]
    assert set(ranked(whole, "seconds")) == {"tiny", "dice"}


def test_equal_seconds_need_the_default(start: Callable[..., Comparing]) -> None:
    with pytest.raises(ConfigError, match="as long as tiny takes"):
        start(plan=replace(PLAN, methods=("dice",), equal_seconds=True))


def test_another_plan_is_refused(start: Callable[..., Comparing]) -> None:
    start(plan=replace(PLAN, methods=("guidance-interval",))).run()
    with pytest.raises(ConfigError, match="other settings"):
        start(plan=replace(PLAN, samples=5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": ("tiny", "telepathy")}, "no method telepathy; there are tiny"),
        ({"methods": ()}, "at least one method"),
        ({"seeds": ()}, "at least one method and one seed"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1"),
    ],
)
def test_a_plan_that_cannot_be_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(PLAN, **change)


def test_tables_and_plot_show_every_method(start: Callable[..., Comparing]) -> None:
    found = start().run()
    lines = comparison_markdown(found, "samples").splitlines()
    assert len(lines) == 2 + len(PLAN.methods)
    assert all(line.count("|") == len(HEADINGS) + 1 for line in lines)
    assert sum("(default)" in line for line in lines) == 1
    assert comparison_table(found, "samples").row_count == len(PLAN.methods)
    kept = [found.kept_on_fine_tunes(name, "samples") for name in ranked(found, "samples")]
    assert all(math.isnan(k) for k in kept) or kept == sorted(kept, reverse=True)
    assert png(pareto(found, "samples")).startswith(b"\x89PNG")
