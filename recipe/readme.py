"""``readme``: the README's table and figures, from ``results/guide.json``."""

from __future__ import annotations

from pathlib import Path

from pilotfish.evaluation.result import Result
from pilotfish.evaluation.table import LEGEND, markdown_table
from recipe.pages import write_measured


def measured(result: Result) -> str:
    """The table, and what to know of it."""
    run, guide = result.run, result.guide
    return (
        f"{markdown_table(result).rstrip()}\n\n"
        f"Measured by `{run.command}` on {run.machine}, seed {run.seed}, {run.samples:,} pictures "
        f"per host and way, {run.num_inference_steps} steps; everything is in "
        "[results/guide.json](results/guide.json), and `--grid` drew the picture above. "
        f"The guide has {guide.parameters:,} parameters, {guide.share:.2%} of the denoiser's, and "
        "was trained on none of these fine-tunes; it descends from a mean of guides that was "
        "chosen by its guidance error on half of the held-out prompts, on the base "
        f"and Fluent, which flatters that figure there. {LEGEND}"
    )


def write_readme(readme: Path, result: Path) -> None:
    """Put the figures between their two marks."""
    write_measured(readme, measured(Result.load(result)))
