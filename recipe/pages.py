"""Stage ``pages``: tables and plots of README and documents, from ``results/``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from baselines.comparison.plots import pareto
from baselines.comparison.result import Comparison
from baselines.comparison.table import comparison_markdown
from pilotfish.evaluation.negative import NegativeResult
from pilotfish.evaluation.plots import save, step_curves
from pilotfish.evaluation.result import Result, Run
from pilotfish.evaluation.steps import StepsResult
from pilotfish.evaluation.table import LEGEND, markdown_table, percent, steps_markdown

AIMS = {"8": {"base": (0.95, 1.05), "": (0.90, 1.15)}, "16": {"base": (1.0, 1.0)}}
"""Of guides for few steps, by their number and by host, "" for a fine-tune: the least share of the
prompt score, and the largest of fd_judge, of CFG with the most steps."""
MEASURED = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)


def write_measured(page: Path, text: str) -> None:
    """Put a text between the two marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    before = page.read_text()
    if not MEASURED.search(before):
        raise ValueError(f"{page} has no <!-- measured --> and <!-- /measured -->")
    page.write_text(MEASURED.sub(lambda m: m[1] + text.rstrip() + "\n" + m[2], before))


def write_pages(root: Path) -> None:
    """Write the README and those documents of the repository whose results are there."""
    results, docs = root / "results", root / "docs"
    pages: dict[str, tuple[Path, Callable[[Path], str]]] = {
        "guide": (root / "README.md", lambda p: readme_text(Result.load(p))),
        "steps": (docs / "steps.md", lambda p: steps_page(StepsResult.load(p), docs)),
        "compare": (docs / "compare.md", lambda p: compare_page(Comparison.load(p), docs)),
        "negative": (docs / "method.md", lambda p: negatives_text(NegativeResult.load(p))),
    }
    for name, (page, text) in pages.items():
        if (file := results / f"{name}.json").is_file():
            write_measured(page, text(file))


def readme_text(found: Result) -> str:
    """The README's table and its legend."""
    run, guide = found.run, found.guide
    return (
        f"{markdown_table(found).rstrip()}\n\n"
        f"Measured by `{run.command}` on {run.machine}, seed {run.seed}, {run.samples:,} pictures "
        f"per host and way, {run.num_inference_steps} steps; everything is in "
        "[results/guide.json](results/guide.json), and `--grid` drew the picture above. "
        f"The guide has {guide.parameters:,} parameters, {guide.share:.2%} of the denoiser's, and "
        "was trained on none of these fine-tunes; it descends from a mean of guides that was "
        "chosen by its guidance error on half of the held-out prompts, on the base "
        f"and Fluent, which flatters that figure there. {LEGEND}"
    )


def negatives_text(found: NegativeResult) -> str:
    """What the guide makes of negative prompts on each host, in a sentence."""
    hosts = ", ".join(
        f"{host.told.mean:.3f} on {name} ({host.ratio:.2f} times that with the null prompt; "
        f"{host.ratio_ignoring:.2f} where the guide ignores it)"
        for name, host in found.hosts.items()
    )
    scales = ", ".join(next(iter(found.hosts.values())).told.by_w)
    return (
        f"Measured by `{found.run.command}` on {found.run.machine}, seed {found.run.seed}, "
        f"{found.run.samples} held-out pairs, w = {scales}; everything is in "
        f"`results/negative.json`. Told a negative prompt, the guidance error is {hosts}."
    )


def steps_page(found: StepsResult, docs: Path) -> str:
    """What was aimed at, then a plot and a table for each host."""
    parts = [_run(found.run, "results/steps.json"), aims(found)]
    for host in found.hosts:
        image = f"images/steps/{host}.png"
        save(step_curves(found, host), docs / image)
        parts += [f"### {host}", f"![Scores on {host} against passes]({image})",
                  steps_markdown(found, host)]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts)


def aims(found: StepsResult, way: str = "few") -> str:
    """How near the guides for few steps come to CFG with the most, beside what is asked of them."""
    most = str(max(map(int, next(iter(found.hosts.values()))["cfg"])))
    lines = [
        f"| CFG, {most} steps, is 1 | passes | top-1 | at least | fd_judge | at most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for steps, wanted in AIMS.items():
        for host, ways in found.hosts.items():
            asked = wanted.get(host, wanted.get(""))
            if asked is None or steps not in ways.get(way, {}):
                continue
            cell, cfg = ways[way][steps], ways["cfg"][most].scores
            share = percent(cell.scores.prompt_score / cfg.prompt_score)
            distance = cell.scores.fd_judge / cfg.fd_judge
            lines.append(
                f"| {host}, {steps} steps | {cell.passes:g} "
                f"| {share} | {percent(asked[0])} | {distance:.2f} | {asked[1]:g} |"
            )
    return "\n".join(lines)


def compare_page(found: Comparison, docs: Path) -> str:
    """A plot and a table for each budget."""
    plan = found.plan
    parts = [
        _run(found.run, "results/compare.json")
        + f" Trained for {plan['max_train_steps']} steps of {plan['train_batch_size']} states. "
        "*FLOPs* and *speed* are beside CFG; *kept* is the share of CFG's gain in prompt score."
    ]
    for budget in found.budgets:
        image = f"images/compare/{budget}.png"
        save(pareto(found, budget), docs / image)
        parts += [f"### Equal {budget}", f"![Gain kept against cost, equal {budget}]({image})",
                  comparison_markdown(found, budget)]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts)


def _run(run: Run, where: str) -> str:
    return (
        f"Measured by `{run.command}` on {run.machine}, seed {run.seed}, {run.samples:,} pictures "
        f"for each cell, w = {run.guidance_scale:g}; everything is in `{where}`."
    )
