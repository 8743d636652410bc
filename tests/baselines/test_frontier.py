"""A frontier: every point counted and measured once, in any pieces, with the same figures."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from baselines.frontier import run
from baselines.frontier.methods import candidates
from baselines.frontier.references import figures, part_of
from baselines.frontier.report import frontier_markdown, frontier_plot, groups, summary_markdown
from baselines.frontier.results import FrontierEntry, FrontierResult, FrontierRun
from baselines.frontier.run import Frontier, FrontierConfig, settings_of
from pilotfish import cli
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelScorer, ModelSource, ScoredImages
from pilotfish.evaluation.results import Scores
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError
from pilotfish.training.config import ConfigError
from tests.components import randomise

STEPS = 4
CONFIG = FrontierConfig(
    samples=6, baseline_samples=3, num_inference_steps=STEPS, reference_steps=5, batch_size=4,
    trajectories=2, rounds=1,
)  # fmt: skip
KEYS = {
    "method", "refresh", "steps", "passes", "top1", "gain_kept", "interval", "top5_kept",
    "latent_mse_ratio", "fd", "flops_over_none", "cfg_over_it", "samples", "seed", "setting",
    "command", "machine",
}  # fmt: skip
Start = Callable[..., Frontier]


@pytest.fixture
def guides(make_pipe: Callable[[str], Any]) -> dict[str, Guide]:
    """One for any number of steps and one for two."""
    denoiser = make_pipe("epsilon").unet
    few = TinyGuide.for_denoiser(denoiser, "epsilon", times=(0.999, 0.499))
    return {"mine": randomise(TinyGuide.for_denoiser(denoiser, "epsilon")), "mine-2": few}


@pytest.fixture
def start(
    make_pipe: Callable[[str], Any], scorer: Scorer, names: list[str], real: Path, tmp_path: Path,
    guides: dict[str, Guide],
) -> Start:  # fmt: skip
    """A function that begins or resumes a frontier in a folder, on two models."""
    models = {
        "base": ModelSource(lambda: make_pipe("epsilon"), real),
        "other": ModelSource(lambda: make_pipe("epsilon")),
    }

    def make(folder: str = "run", config: FrontierConfig = CONFIG, **changed: Any) -> Frontier:
        noted = FrontierRun(prompts="0", dtype="float32", versions={}, **settings_of(config))
        given: dict[str, Any] = {
            "models": models, "guides": guides, "trained": {}, "run": noted,
            "command": "a command", "machine": "one",
        }  # fmt: skip
        given |= changed
        return Frontier(
            config, base=("base", models["base"]), scorer=scorer, names=names,
            train_prompts=["cat", "a"], file=tmp_path / folder / "frontier.json",
            folder=tmp_path / folder / "references", log=lambda line: None, **given,
        )  # fmt: skip

    return make


def test_a_whole_frontier_is_measured_counted_and_not_repeated(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = start().measure()
    text = json.loads((tmp_path / "run" / "frontier.json").read_text())
    assert set(text) == {"run", "models"}
    assert list(text["models"]) == ["base", "other"]
    assert all(set(entry) == KEYS for entries in text["models"].values() for entry in entries)

    for model, entries in found.models.items():
        assert len({entry.key for entry in entries}) == len(entries)
        for entry in entries:
            if math.isfinite(entry.refresh):
                assert entry.passes == entry.steps + entry.refresh, "counted, not computed"
            assert entry.samples == (6 if entry.method in WHOLE and not entry.setting else 3)
            assert math.isnan(entry.fd) == (model == "other")
            assert entry.has_cost
        for steps in (STEPS, 5):
            none, cfg = (found.find(model, (m, k, "", steps)) for m, k in
                         (("none", "0"), ("cfg", str(steps))))  # fmt: skip
            assert none is not None
            assert cfg is not None
            assert (none.latent_mse_ratio, cfg.latent_mse_ratio) == (1, 0)
            assert cfg.flops_over_none == pytest.approx(2, rel=0.01)
    few = [e.refresh for e in found.models["base"] if e.method == "mine-2"]
    assert few == [0, 1]
    mine = [e for e in found.models["base"] if e.method == "mine" and not e.setting]
    assert [e.refresh for e in mine] == [0, 1, 2, 3]
    assert all(1 < e.flops_over_none < 2 for e in mine)
    assert FrontierResult.load(tmp_path / "run" / "frontier.json").to_json() == found.to_json()

    monkeypatch.setattr(ModelScorer, "score", pytest.fail)
    monkeypatch.setattr(run, "take_turns", pytest.fail)
    monkeypatch.setattr(run, "gram_matrix", pytest.fail)
    assert start().measure().to_json() == found.to_json()


INTERVAL = "guidance-interval"
WHOLE = ("none", "cfg", "mine", "mine-2", "delta-reuse")


def figures_of(found: FrontierResult) -> dict[str, Any]:
    """Everything that does not depend on the clock or the order."""
    return {
        model: {e.key: repr(replace(e, cfg_over_it={}, flops_over_none=0.0)) for e in entries}
        for model, entries in found.models.items()
    }


def test_pieces_add_up_to_the_same_frontier(start: Start) -> None:
    config = replace(CONFIG, methods=("mine", "linear-ag"), refresh=(2, 3), rounds=None)
    whole, base = start("whole", config).measure(), start().models["base"]
    part = start("parts", replace(config, refresh=(2,)), models={"base": base}).measure()
    assert list(part.models) == ["base"]
    assert {entry.steps for entry in part.models["base"]} == {STEPS}, "no guide for few steps"
    part = start("parts", replace(config, methods=("linear-ag",))).measure()
    assert not any(entry.has_cost for entries in part.models.values() for entry in entries)
    assert figures_of(start("parts", config).measure()) == figures_of(whole)
    timed = start("parts", replace(config, rounds=1)).measure()
    assert all(entry.has_cost for entry in timed.models["base"])


def test_a_result_names_the_commands_that_measured_it(start: Start) -> None:
    def measured(command: str, machine: str, *refresh: int) -> list[str]:
        config = replace(CONFIG, methods=("mine",), refresh=refresh)
        frontier = start(config=config)
        frontier.command, frontier.machine = command, machine
        frontier.measure()
        found = FrontierResult.load(frontier.file)
        return [*found.commands, *found.machines]

    assert measured("first", "one", 1) == ["first", "one"]
    assert measured("second", "one", 1, 2) == ["first", "second", "one"]
    assert measured("nothing new", "another", 1) == ["first", "second", "one"]
    assert measured("third", "another", 3) == ["first", "second", "third", "one", "another"]


def test_pieces_may_be_measured_at_the_same_time(start: Start) -> None:
    config = replace(CONFIG, methods=("mine", "delta-reuse"), refresh=(1,))
    whole = start("whole", config).measure()
    both = [start("parts", replace(config, methods=(name,))) for name in config.methods]
    for part in both:  # neither knows of the other when it starts
        part.measure()
    assert figures_of(start("parts", config).found) == figures_of(whole)


def test_interrupted_anywhere_it_ends_with_the_same_figures(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptError(Exception):
        pass

    save, config = Frontier.save, replace(CONFIG, methods=("mine", "linear-ag"), refresh=(2,))

    def save_and_stop(self: Frontier) -> None:
        save(self)
        raise InterruptError

    whole = start("whole", config).measure()
    with monkeypatch.context() as patch:
        patch.setattr(Frontier, "save", save_and_stop)
        for _ in range(sum(map(len, whole.models.values()))):
            with pytest.raises(InterruptError):
                start("parts", config).measure()
    monkeypatch.setattr(ModelScorer, "score", pytest.fail)
    assert figures_of(start("parts", config).measure()) == figures_of(whole)


def test_what_has_changed_is_measured_again(start: Start, guides: dict[str, Guide]) -> None:
    config = replace(CONFIG, methods=("mine", "delta-reuse"), refresh=(1,))
    before = figures_of(start(config=config).measure())
    randomise(guides["mine"], seed=9)
    after = figures_of(start(config=config).measure())
    for model, entries in after.items():
        changed = {key[0] for key, text in entries.items() if text != before[model][key]}
        assert changed == {"mine"}


def test_a_guide_of_another_base_is_refused_before_any_image(
    start: Start, make_pipe: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelScorer, "score", pytest.fail)
    unfit = TinyGuide.for_denoiser(make_pipe("epsilon").unet, "v_prediction")
    with pytest.raises(GuideError, match="made for another denoiser"):
        start(trained={"agd": unfit}).measure()


def test_images_of_another_clone_are_used_again(
    start: Start, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, methods=("none", "cfg"))
    first = start(config=config)
    found = first.measure()
    other = ModelSource(first.models["base"].load, shutil.copytree(real, tmp_path / "clone"))
    (tmp_path / "run" / "frontier.json").unlink()
    monkeypatch.setattr(ModelScorer, "score", pytest.fail)
    again = start(config=config, models={**first.models, "base": other}).measure()
    assert figures_of(again) == figures_of(found)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 5}, "other settings"),
        ({"samples": 8}, "other settings"),
        ({"methods": ("telepathy",)}, "unknown methods: telepathy; available: none, cfg, mine"),
        ({"refresh": (3, 6)}, "nothing is measured with 6 second passes; available: 0, 1, 2, 3"),
    ],
)
def test_a_frontier_that_cannot_go_on_is_refused(
    start: Start, change: dict[str, Any], sentence: str
) -> None:
    start(config=replace(CONFIG, methods=("mine",), refresh=(0,))).measure()
    with pytest.raises(ConfigError, match=sentence):
        start(config=replace(CONFIG, **change))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"baseline_samples": 7}, "at most samples, not 7 of 6"),
        ({"baseline_samples": 1}, "at least 2"),
        ({"guidance_scale": 1.0}, "guidance_scale must be above 1"),
        ({"trajectories": 0}, "trajectories must be at least 1"),
    ],
)
def test_an_impossible_configuration_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(CONFIG, **change)


def test_the_published_frontier_has_the_points_of_ours(guides: dict[str, Guide]) -> None:
    found = candidates(guides, {"agd": guides["mine"]}, lambda: torch.eye(50), 25, 50)
    counts = {
        name: [
            one.refresh
            for one in found
            if one.method == name and one.steps == 25 and (one.whole or name in ("agd", INTERVAL))
        ]
        for name in ("mine", "delta-reuse", "agd", INTERVAL)
    }
    elsewhere = {one.setting for one in found if one.method == "mine" and not one.whole}
    assert elsewhere == {"evenly", "evenly from the first step"}
    assert counts == {
        "mine": [0, 1, 2, 3, 4, 5, 8], "delta-reuse": [1, 2, 3, 4, 5, 8], "agd": [0, 3, 5],
        INTERVAL: [3, 5, 8, 12, 15],
    }  # fmt: skip
    assert len({one.key for one in found}) == len(found)
    assert {one.method for one in found if one.whole} == {
        "none", "cfg", "mine", "mine-2", "delta-reuse"
    }  # fmt: skip


def test_the_figures_of_a_part_are_those_of_its_images() -> None:
    hits = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 1])
    scores = Scores(0.5, 0.6, 0.7, 0.8)

    def images(by: float) -> ScoredImages:
        own = torch.where(torch.arange(8) < 8 * by, 1.0, hits)
        return ScoredImages(scores, own, own, by * torch.ones(8, 1), 25.0)

    none, cfg, own = (part_of(images(by), 2, 3) for by in (0.0, 1.0, 0.25))
    assert torch.equal(none.hits, hits[[0, 2, 4]])
    found = figures(own, none, cfg, torch.arange(3))
    assert found["gain_kept"] == 0, "what was won lies outside the part"
    assert found["latent_mse_ratio"] == pytest.approx(0.75**2)
    assert found["samples"] == 3


def entry(**changed: Any) -> FrontierEntry:
    plain = FrontierEntry(
        "tiny", 3, 25, 28.0, 0.5, 0.9, (0.8, 0.95), 0.9, 0.1, 4.0, 1.12, {"1": 1.5, "8": 1.7},
        samples=100, seed=0, command="a command", machine="one",
    )  # fmt: skip
    return replace(plain, **changed)


def result(**models: list[FrontierEntry]) -> FrontierResult:
    noted = FrontierRun(0, 100, 50, 4.0, 25, 50, "0", "float32", {})
    return FrontierResult(noted, models)


def test_tables_and_plots_show_means_of_what_is_on_all_models() -> None:
    near = [entry(gain_kept=0.7, interval=(0.6, 0.8)), entry(method="cfg", refresh=25)]
    found = result(
        base=[entry(), entry(refresh=0, passes=25.0, cfg_over_it={}, fd=math.nan)],
        one=near, two=[entry(gain_kept=0.8, interval=(0.7, 0.9))], distant=[entry()],
    )  # fmt: skip
    columns = groups(found, "base", ["distant", "never measured"])
    assert columns == {
        "base": ["base"],
        "fine-tunes": ["one", "two"],
        "far fine-tunes": ["distant"],
    }
    lines = frontier_markdown(found, columns).splitlines()
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    (three,) = [line for line in lines if line.startswith("| Pilotfish, tiny | 3 |")]
    assert "| 56 % | 1.50× | 1.70× | 90 % (80–95) | 75 % (65–85) | 90 % (80–95) |" in three
    (none,) = [line for line in lines if line.startswith("| Pilotfish, tiny | 0 |")]
    assert "| – | – | 90 % (80–95) | – | – |" in none
    assert not [line for line in lines if line.startswith("| CFG |")], "on one fine-tune alone"
    figure = frontier_plot(found, columns, ["tiny"])
    assert len(figure.axes) == 2 * len(columns)
    assert len(frontier_plot(result(base=[entry()]), {"base": ["base"]}, []).axes) == 2


def test_a_summary_has_a_column_for_each_entry_that_is_asked_for() -> None:
    plain = {"none": entry(method="none", refresh=0, top1=0.2), "cfg": entry(method="cfg",
             refresh=25, top1=0.6, passes=50.0)}  # fmt: skip
    found = result(base=[entry(), *plain.values()], other=[entry(top1=0.4), *plain.values()])
    columns = {"no guidance": ("none", 0), "K = 3": ("tiny", 3), "CFG": ("cfg", 25)}
    assert summary_markdown(found, columns, ["base", "other"], "K = 3").splitlines()[2:] == [
        "| top-1, base | 20 % | **50 %, 90 % (80–95)** | 60 % |",
        "| top-1, other | 20 % | **40 %, 90 % (80–95)** | 60 % |",
        "| denoiser passes | 28 | **28** | 50 |",
    ]
    with pytest.raises(KeyError, match="tiny with 5 refreshes is not measured on base"):
        summary_markdown(found, {"K = 5": ("tiny", 5)}, ["base"])


def test_the_command_writes_result_table_and_plot(
    make_pipe: Callable[[str], Any], clip: tuple[Any, Any], names: list[str], tmp_path: Path,
    guides: dict[str, Guide], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    for part in clip:
        part.save_pretrained(tmp_path / "scorer")
    guides["mine"].save_pretrained(tmp_path / "mine")
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = [
        "compare", "--frontier", "--methods", "mine", "other", "delta-reuse", "--refresh", "0",
        "2", "--samples", "4", "--baseline_samples", "2", "--num_inference_steps", "3",
    ]  # fmt: skip
    values = {
        "models": "base", "base": "base", "guides": "mine", "trained": f"other={tmp_path / 'mine'}",
        "scorer": "scorer", "prompts": "names.txt", "train_prompts": "names.txt",
        "output": "out.json", "plot": "out.png", "references": "references",
    }  # fmt: skip
    for flag, value in values.items():
        flags += [f"--{flag}", value if "=" in value else str(tmp_path / value)]
    assert cli.main(flags) == 0, capsys.readouterr().err
    assert "| kept, base |" in capsys.readouterr().out
    found = FrontierResult.load(tmp_path / "out.json")
    assert [(e.method, e.refresh) for e in found.models["base"] if not e.setting] == [
        ("none", 0), ("cfg", 3), ("mine", 0), ("mine", 2), ("other", 0), ("delta-reuse", 2),
    ]  # fmt: skip
    assert Image.open(tmp_path / "out.png").size[0] > 300
    monkeypatch.setattr(ModelScorer, "score", pytest.fail)
    assert cli.main(flags) == 0
    assert cli.main([*flags, "--seed", "7"]) == 1
    assert "other settings" in capsys.readouterr().err
