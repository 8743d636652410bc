"""Tables and plots of the documents are those of the committed results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baselines.comparison.results import (
    ComparisonResult,
    MethodCost,
    MethodResult,
    MethodRun,
    ModelScores,
    Training,
)
from baselines.frontier.results import FrontierEntry, FrontierResult, FrontierRun
from benchmarks.presets import PresetsResult, presets_markdown
from pilotfish.evaluation.results import (
    CurveResult,
    GuideSize,
    Interval,
    NegativeResult,
    Point,
    Run,
    Scores,
)
from recipe.pages import (
    REFRESH,
    compare_page,
    few_steps_text,
    negatives_text,
    readme_text,
    refresh_page,
    steps_page,
    targets,
    write_measured,
    write_pages,
)

ROOT = Path(__file__).parent.parent
RUN = Run("pilotfish something", 3, 200, 4.0, 25, "a machine", {})
MADE = {
    "docs/steps.md": (
        "results/steps.json", lambda file, to: steps_page(CurveResult.load(file), to),
    ),
    "docs/compare.md": (
        "results/compare.json", lambda file, to: compare_page(ComparisonResult.load(file), to),
    ),
    "docs/train.md": (
        "results/presets.json", lambda file, _: presets_markdown(PresetsResult.load(file)),
    ),
    "docs/method.md": (
        "results/negative.json", lambda file, _: negatives_text(NegativeResult.load(file)),
    ),
}  # fmt: skip


def steps() -> CurveResult:
    points = {str(n): Point(n, Scores(0.5 + n / 100, 0.7, 0.6, 4.0)) for n in (4, 8)}
    methods = {"none": points, "cfg": points, "mine": points}
    clock = {method: {"4": 0.5, "8": 1.0} for method in methods}
    sizes = {"mine": GuideSize("m", 9, 0.01)}
    models = {"base": methods, "other": methods}
    return CurveResult("num_inference_steps", models, clock, sizes, RUN)


def comparison() -> ComparisonResult:
    scores = Scores(0.5, 0.7, 0.6, 4.0)
    own = ModelScores(0.3, 0.2, 0.87, Interval(0.8, 0.9), 0.9, 25.0, scores)
    runs = {f"{b}-0": MethodRun(Training(9, 9, 1.0), {"base": own, "other": own})
            for b in ("samples", "seconds")}  # fmt: skip
    method = MethodResult("Ours", 9, 0.01, MethodCost(25, 1.01, 1.9), runs)
    references = {h: {"none": scores, "cfg": scores} for h in ("base", "other")}
    settings = {"max_train_steps": "9", "train_batch_size": "64"}
    return ComparisonResult("ours", {"ours": method}, references, settings, RUN)


def test_targets_are_of_the_models_that_were_measured() -> None:
    _, _, base, other = targets(steps(), "mine").splitlines()
    assert base == "| base, 8 steps | 8 | 100 % | 95 % | 1.00 | 1.05 |"
    assert other == "| other, 8 steps | 8 | 100 % | 90 % | 1.00 | 1.15 |"
    assert len(targets(steps(), "few").splitlines()) == 2


def test_pages_are_written_from_results(tmp_path: Path) -> None:
    steps().save(tmp_path / "results" / "steps.json")
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "steps.md"
    page.write_text("# Before\n<!-- measured: steps -->\nold\n<!-- /measured -->\nafter\n")
    write_pages(tmp_path)
    text = page.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "pilotfish something" in text
    assert "a machine, seed 3, 200 images" in text
    for host in ("base", "other"):
        assert f"### {host}" in text
        assert (docs / "images" / "steps" / f"{host}.png").is_file()
    again = page.read_bytes()
    write_pages(tmp_path)
    assert page.read_bytes() == again


def test_a_comparison_has_a_part_for_each_budget(tmp_path: Path) -> None:
    text = compare_page(comparison(), tmp_path)
    for budget in ("samples", "seconds"):
        assert f"### Equal {budget}" in text
        assert (tmp_path / "images" / "compare" / f"{budget}.png").is_file()
    assert text.count("Ours (default) | 1.00 %") == 2


def frontier(guide: str = "tiny", *models: str) -> FrontierResult:
    def entry(method: str, refresh: int) -> FrontierEntry:
        return FrontierEntry(
            method, refresh, 25, 25 + refresh, 0.5, 0.9, (0.8, 1.0), 0.9, 0.1, 4.0, 1.1,
            {"1": 1.4, "8": 1.7}, 100, 0, f"measure {method}", "one",
        )  # fmt: skip

    entries = [entry("none", 0), entry("cfg", 25), entry(guide, 0), entry(guide, REFRESH),
               entry("not shown", 1)]  # fmt: skip
    noted = FrontierRun(0, 100, 50, 4.0, 25, 50, "0", "bfloat16", {})
    noted.guides[guide] = GuideSize("tiny", 1234, 0.01)
    return FrontierResult(noted, dict.fromkeys(models or ("base", "fluent"), entries))


def test_the_readme_compares_the_guide_without_and_with_refreshes() -> None:
    text = readme_text(frontier())
    assert "| w = 4, 25 steps | no guidance | guided | guided, refresh=3 | CFG |" in text
    assert "| denoiser passes | 25 | 25 | **28** | 50 |" in text
    assert "| top-1, fluent | 50 % |" in text
    assert "1,234 parameters, 1.00%" in text
    by = "Measured by `measure none` and `measure tiny` and `measure cfg` on one, seed 0"
    assert by in text, "not what measured other entries"


def test_the_readme_has_both_bases() -> None:
    text = readme_text(frontier(), frontier("sd3-tiny", "sd3", "sd3-fluent"))
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| top-1")]
    assert rows == [f"| top-1, {name}" for name in ("base", "fluent", "sd3", "sd3-fluent")]
    assert "[results/sd3/frontier.json](results/sd3/frontier.json)" in text


def test_the_refresh_page_has_the_plot_and_every_point(tmp_path: Path) -> None:
    text = refresh_page(frontier(), tmp_path)
    assert (tmp_path / "images" / "frontier.png").is_file()
    assert text.count("| Pilotfish, tiny |") == 2


def test_guides_for_few_steps_are_compared_with_cfg_of_many() -> None:
    found = frontier()
    found.run.guides["tiny-4"] = GuideSize("tiny-4", 1234, 0.01)
    plain = found.models["base"][1]
    few = replace(plain, method="tiny-4", steps=4, refresh=2, passes=6.0, top1=0.45)
    many = replace(plain, refresh=50, steps=50, passes=100.0)
    for name in found.models:
        found.models[name] = [*found.models[name], few, many]
    text = few_steps_text(found)
    assert "| guide | second passes | passes | base | fluent | latent MSE, base |" in text
    assert "| tiny-4 | 2 | 6 | 90 % | 90 % | 0.100 |" in text
    assert text.count("| tiny") == 1, "no guide for any number of steps"


def test_a_page_without_marks_is_named(tmp_path: Path) -> None:
    (tmp_path / "steps.md").write_text("# No marks\n")
    with pytest.raises(ValueError, match=r"steps.md has no <!-- measured: steps -->"):
        write_measured(tmp_path / "steps.md", "steps", "text")


@pytest.mark.parametrize("page", MADE)
def test_pages_say_what_the_committed_results_say(page: str, tmp_path: Path) -> None:
    where, made = MADE[page]
    file = ROOT / where
    if not file.is_file():
        pytest.skip(f"{where} is not there")
    assert made(file, tmp_path) in (ROOT / page).read_text()
