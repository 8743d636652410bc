"""``pages``: tables and plots of the documents, from what is in ``results``."""

from __future__ import annotations

import re
from pathlib import Path

from pilotfish.compare.plots import pareto
from pilotfish.compare.result import Comparison
from pilotfish.compare.table import comparison_markdown
from pilotfish.evaluate.plots import save, step_curves
from pilotfish.evaluate.result import Run
from pilotfish.evaluate.steps import StepsResult
from pilotfish.evaluate.table import steps_markdown

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


def write_pages(results: Path, docs: Path) -> None:
    """Write those pages whose result is there, and their plots."""
    if (results / "steps.json").is_file():
        write_measured(
            docs / "steps.md", steps_page(StepsResult.load(results / "steps.json"), docs)
        )
    if (results / "compare.json").is_file():
        write_measured(
            docs / "compare.md", compare_page(Comparison.load(results / "compare.json"), docs)
        )


def steps_page(found: StepsResult, docs: Path) -> str:
    """A plot and a table for each host."""
    parts = [_run(found.run, "results/steps.json")]
    for host in found.hosts:
        image = f"images/steps/{host}.png"
        save(step_curves(found, host), docs / image)
        parts += [f"### {host}", f"![Scores on {host} against passes]({image})",
                  steps_markdown(found, host)]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts)


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
