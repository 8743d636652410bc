"""A comparison: equal terms, nothing done twice, nothing lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from baselines import RULES, GuidanceInterval
from baselines.comparison import run
from baselines.comparison.config import DEFAULT, ComparisonConfig
from baselines.comparison.report import HEADINGS, comparison_markdown, comparison_table, pareto
from baselines.comparison.results import ComparisonResult
from baselines.comparison.run import Comparison, ModelEvaluator
from pilotfish import cli
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelSource
from pilotfish.guides import Guide, TinyGuide
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.stages import distill
from pilotfish.training.trainer import TrainingError

STEPS = 3
CONFIG = ComparisonConfig(
    methods=("tiny", "dice", "guidance-interval"), max_train_steps=4, train_batch_size=4,
    samples=4, validation_samples=2, num_inference_steps=STEPS, rounds=1, equal_seconds=False,
    batch_size=3, learning_rates=(1.0,),
)  # fmt: skip
Start = Callable[..., Comparison]


@pytest.fixture
def start(
    make_pipe: Callable[[str], Any], scorer: Scorer, names: list[str], real: Path, tmp_path: Path
) -> Start:
    """A function that begins or resumes a comparison in a folder, on two models."""
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(names))
    training = {
        "pretrained_model_name_or_path": str(tmp_path / "base"),
        "prompts": str(tmp_path / "prompts.txt"),
        "validation_prompts": str(tmp_path / "prompts.txt"),
        "pool": 8, "replay_capacity": 8,
        "trajectory_steps_min": 2, "trajectory_steps_max": 4,
    }  # fmt: skip
    models = {
        "base": ModelSource(lambda: make_pipe("epsilon"), real),
        "other": ModelSource(lambda: make_pipe("epsilon")),
    }

    def make(folder: str = "run", config: ComparisonConfig = CONFIG) -> Comparison:
        return Comparison(
            config, models, scorer, tmp_path / folder, names=names,
            validation_prompts=["cat", "a"], training=training, command="pilotfish compare",
            log=lambda line: None,
        )  # fmt: skip

    return make


def test_cfg_keeps_its_whole_gain_and_a_fresh_guide_none(
    make_pipe: Callable[[str], Any], scorer: Scorer, names: list[str], real: Path
) -> None:
    evaluator = ModelEvaluator(
        ModelSource(lambda: make_pipe("epsilon"), real), scorer, CONFIG, names=names,
        validation_prompts=["cat", "a"],
    )  # fmt: skip
    cfg = evaluator.measure(GuidanceInterval(0, 1000))
    assert cfg.latent_mse_ratio == 0
    assert cfg.scores == evaluator.cfg.scores
    assert cfg.passes == 2 * STEPS
    assert math.isnan(cfg.guidance_error)
    assert cfg.gain_kept_cosine == pytest.approx(1)
    fresh = evaluator.measure(TinyGuide.for_denoiser(evaluator.pipe.unet, "epsilon"))
    assert fresh.latent_mse_ratio == pytest.approx(1, abs=1e-3)
    assert fresh.guidance_error == pytest.approx(1, abs=1e-3)
    assert fresh.gain_kept_cosine == pytest.approx(0, abs=1e-2)
    assert fresh.passes == STEPS


def test_a_whole_comparison_is_measured_shown_and_not_repeated(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = start().run()
    assert list(found.methods) == list(CONFIG.methods)
    assert found.default == DEFAULT
    for name, method in found.methods.items():
        trained = name not in RULES
        assert set(method.runs) == {"samples-0" if trained else "free"}
        (only,) = method.runs.values()
        assert set(only.models) == {"base", "other"}
        assert (method.parameters > 0) == (only.training.seconds > 0) == trained
        assert only.training.samples == (16 if trained else 0)
        assert method.cost.cfg_over_method > 0
    interval, tiny = (found.methods[n].cost for n in ("guidance-interval", "tiny"))
    assert STEPS < interval.passes < 2 * STEPS
    assert tiny.passes == STEPS
    assert 1 < tiny.flops_over_none < 1.5
    assert ComparisonResult.load(tmp_path / "run" / "compare.json").to_json() == found.to_json()

    lines = comparison_markdown(found, "samples").splitlines()
    assert len(lines) == 2 + len(CONFIG.methods)
    assert all(line.count("|") == len(HEADINGS) + 1 for line in lines)
    assert sum("(default)" in line for line in lines) == 1
    assert comparison_table(found, "samples").row_count == len(CONFIG.methods)
    kept = [found.gain_kept_on_fine_tunes(n, "samples") for n in found.ranked("samples")]
    assert all(math.isnan(k) for k in kept) or kept == sorted(kept, reverse=True)
    assert len(pareto(found, "samples").axes) == 2

    for name in ("distill", "ModelEvaluator", "take_turns"):
        monkeypatch.setattr(run, name, pytest.fail)
    assert start().run().to_json() == found.to_json()
    with pytest.raises(ConfigError, match="other settings"):
        start(config=replace(CONFIG, samples=5))


def scores(found: ComparisonResult) -> str:
    """Everything that does not depend on the clock."""
    methods = json.loads(found.to_json())["methods"]
    return json.dumps({
        name: {key: run["models"] for key, run in method["runs"].items()}
        for name, method in methods.items()
    })  # fmt: skip


def test_interrupted_anywhere_it_ends_with_the_same_figures(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = ComparisonResult.save

    class InterruptError(Exception):
        pass

    def save_and_stop(self: ComparisonResult, path: str | Path) -> None:
        save(self, path)
        raise InterruptError

    config = replace(CONFIG, methods=("tiny", "guidance-interval"))
    whole, interruptions = start("whole", config).run(), 0
    with monkeypatch.context() as patch:
        patch.setattr(ComparisonResult, "save", save_and_stop)
        for _ in range(6):
            with pytest.raises(InterruptError):
                start("parts", config).run()
            interruptions += 1
    assert interruptions == 6
    assert scores(start("parts", config).run()) == scores(whole)


def test_equal_seconds_are_those_of_the_default(start: Start, tmp_path: Path) -> None:
    config = replace(CONFIG, methods=("tiny", "dice"), equal_seconds=True)
    found = start(config=config).run()
    assert not (tmp_path / "run" / "tiny" / "seconds-0").exists()
    assert found.budgets == ["samples", "seconds"]
    tiny, dice = (found.methods[n].runs for n in config.methods)
    assert tiny["seconds-0"] == tiny["samples-0"], "the same guide, trained and measured once"
    step = dice["samples-0"].training.seconds / CONFIG.max_train_steps
    wanted = max(1, round(tiny["samples-0"].training.seconds / step))
    assert dice["seconds-0"].training.steps == wanted


def test_each_method_has_the_best_of_its_learning_rates_and_a_longer_training(
    start: Start, tmp_path: Path
) -> None:
    config = replace(
        CONFIG, methods=("tiny", "guidance-interval"), learning_rates=(0.01, 1.0, 1e4),
        rate_train_steps=3, long_train_steps=6,
    )  # fmt: skip
    found = start(config=config).run()
    tiny, folder, errors = found.methods["tiny"], tmp_path / "run" / "tiny", {}
    for factor in config.learning_rates:
        rate = TinyGuide.learning_rate * factor
        history = json.loads((folder / f"rate-{rate:g}" / "history.json").read_text())
        errors[rate] = history[-1]["guidance_error"]
    assert len(set(errors.values())) == 3
    best = min(errors, key=errors.__getitem__)
    assert tiny.learning_rate == best
    assert set(tiny.runs) == {"samples-0", "long-0"}
    for key, steps in (("samples-0", 4), ("long-0", 6)):
        used = json.loads((folder / key / "config.json").read_text())
        assert (used["learning_rate"], used["max_train_steps"]) == (best, steps)
    assert math.isnan(found.methods["guidance-interval"].learning_rate)
    assert found.budgets == ["samples", "long"]
    assert "6 training steps" in str(comparison_table(found, "long").title)


def test_a_learning_rate_that_diverges_is_not_the_best(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: DistillConfig) -> None:
        tried.append(config.output)
        if "rate" in config.output and config.learning_rate == max(rates):
            Path(config.output).mkdir(parents=True)
            raise TrainingError("the loss is nan")
        distill(config)

    own = Guide.registry["tiny"].learning_rate
    rates, tried = [own, 3 * own], list[str]()
    monkeypatch.setattr(run, "distill", diverging)
    config = replace(CONFIG, methods=("tiny",), learning_rates=(1.0, 3.0), rate_train_steps=2)
    assert start(config=config).run().methods["tiny"].learning_rate == own
    assert len(tried) == len(set(tried)) == 3, "the one that diverged is tried once"


def test_resumed_with_less_it_shows_what_is_complete(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, methods=("tiny", "dice"), equal_seconds=True, seeds=(0, 1))

    def stop(self: Comparison, model: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_measure", stop)
        with pytest.raises(KeyboardInterrupt):
            start(config=config).run()
    fewer = replace(config, equal_seconds=False, seeds=(1,))
    found = start(config=fewer).run()
    assert found.methods["dice"].runs.keys() >= {"samples-0", "samples-1", "seconds-0"}
    assert found.budgets == ["samples"]
    assert set(found.ranked("samples")) == set(fewer.methods)
    assert comparison_table(found, "samples").row_count == len(fewer.methods)
    assert len(pareto(found, "samples").axes) == 2
    whole = start(config=config).run()
    assert whole.budgets == ["samples", "seconds"]
    assert set(whole.ranked("seconds")) == {"tiny", "dice"}


def test_a_model_that_no_guide_of_the_base_fits_is_refused_before_any_training(
    start: Start, make_pipe: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "distill", pytest.fail)
    comparison = start()
    comparison.models["other"] = ModelSource(lambda: make_pipe("v_prediction"))
    with pytest.raises(ConfigError, match="other has another denoiser than the base"):
        comparison.run()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": ("tiny", "telepathy")}, "unknown methods: telepathy; available: tiny"),
        ({"methods": ()}, "at least one method"),
        ({"learning_rates": (0.0,)}, "learning_rates must be above 0"),
        ({"seeds": ()}, "at least one method and one seed"),
        ({"max_train_steps": 0}, "max_train_steps must be at least 1"),
        ({"guidance_scale": 1.0}, "guidance_scale must be above 1"),
        ({"samples": 1}, "samples must be at least 2, not 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_an_impossible_configuration_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(CONFIG, **change)


def test_equal_seconds_need_the_default(start: Start) -> None:
    with pytest.raises(ConfigError, match="training time of tiny"):
        start(config=replace(CONFIG, methods=("dice",), equal_seconds=True))


def test_the_command_writes_figures_and_a_plot(
    make_pipe: Callable[[str], Any], clip: tuple[Any, Any], names: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    for part in clip:
        part.save_pretrained(tmp_path / "scorer")
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = [
        "compare", "--quick", "--methods", "tiny", "guidance-interval",
        "--models", str(tmp_path / "base"), "--scorer", str(tmp_path / "scorer"),
        "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    for file in ("train_prompts", "prompts", "validation_prompts"):
        flags += [f"--{file}", str(tmp_path / "names.txt")]
    assert cli.main(flags) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(found["methods"]) == {"tiny", "guidance-interval"}
    assert Image.open(tmp_path / "out" / "pareto-samples.png").size[0] > 300
    monkeypatch.setattr(run, "distill", pytest.fail)
    assert cli.main(flags) == 0
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found
    assert cli.main([*flags, "--seed", "7"]) == 1
    (tmp_path / "names.txt").write_text("\n".join([*names, "another"]))
    assert cli.main(flags) == 1, "the path is the same, and its prompts are others"
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--models", "fluent"), "must be a base; fluent is not"),
        (("--methods", "telepathy"), "unknown methods: telepathy"),
        (("--guidance_scale", "1"), "guidance_scale must be above 1"),
    ],
)
def test_a_command_that_cannot_run_says_why(
    flags: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--output", str(tmp_path / "out"))
    try:
        code = cli.main(["compare", "--quick", "--methods", "guidance-interval", *where, *flags])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert sentence in " ".join(capsys.readouterr().err.split())
