"""A comparison as tables, on a terminal and in Markdown."""

from __future__ import annotations

from rich.table import Table

from baselines.comparison.result import Comparison
from pilotfish.evaluation.tables import markdown, number, percent, terminal

HEADINGS = ("method", "parameters", "FLOPs", "speed", "kept, base", "kept, fine-tunes",
            "error, base", "error, fine-tunes", "fd_clip, base")  # fmt: skip


def cells(found: Comparison, budget: str) -> list[tuple[str, ...]]:
    """One line a method, best on the fine-tunes first; FLOPs are shares of CFG's, speed is over
    CFG, all else means over trainings."""
    rows: list[tuple[str, ...]] = []
    for name in ranked(found, budget):
        method, cost = found.methods[name], found.methods[name].cost

        def error(*hosts: str, name: str = name) -> float:
            values = [
                found.mean(name, budget, lambda run, h=h: run.hosts[h].guidance_error)  # type: ignore[misc]
                for h in hosts
            ]
            return sum(values) / len(values) if values else float("nan")

        rows.append((
            method.title + (" (default)" if name == found.default else ""),
            f"{100 * method.share:.2f} %", percent(cost.flops_over_plain / 2),
            f"{number(cost.cfg_over_method)}×",
            percent(found.kept(name, found.base, budget)),
            percent(found.kept_on_fine_tunes(name, budget)),
            number(error(found.base)), number(error(*found.fine_tunes)),
            number(found.mean(name, budget, lambda run: run.hosts[found.base].scores.fd_clip), 1),
        ))  # fmt: skip
    return rows


def ranked(found: Comparison, budget: str) -> list[str]:
    """Methods that have a run in the budget, those that keep most on the fine-tunes first."""
    having = [name for name in found.methods if found.runs(name, budget)]
    return sorted(having, key=lambda name: -found.kept_on_fine_tunes(name, budget))


def comparison_table(found: Comparison, budget: str) -> Table:
    """For a terminal."""
    title = f"Equal {budget}: {found.plan['max_train_steps']} training steps"
    return terminal(title, HEADINGS, cells(found, budget))


def comparison_markdown(found: Comparison, budget: str) -> str:
    """For a page."""
    return markdown(HEADINGS, cells(found, budget))
