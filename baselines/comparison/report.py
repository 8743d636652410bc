"""The result of a comparison as a table and as a plot."""

from __future__ import annotations

from matplotlib.figure import Figure
from rich.table import Table

from baselines.comparison.results import ComparisonResult
from pilotfish.evaluation.plots import LIGHT, MARKERS, Theme, clean, legend
from pilotfish.evaluation.tables import markdown, number, percent, terminal

BUDGETS = {
    "samples": "Equal samples", "seconds": "Equal seconds", "long": "Equal samples, long training",
    "free": "Without training",
}  # fmt: skip
HEADINGS = ("method", "parameters", "FLOPs", "speed", "kept, base", "kept, fine-tunes",
            "error, base", "error, fine-tunes", "fd_clip, base")  # fmt: skip


def cells(found: ComparisonResult, budget: str) -> list[tuple[str, ...]]:
    """A line for each method, ranked; FLOPs and speed are relative to CFG."""
    rows: list[tuple[str, ...]] = []
    for name in found.ranked(budget):
        method, base = found.methods[name], found.base
        rows.append((
            method.title + (" (default)" if name == found.default else ""),
            f"{100 * method.share:.2f} %",
            percent(method.cost.flops_over_none / 2),
            f"{number(method.cost.cfg_over_method)}×",
            percent(found.gain_kept(name, base, budget)),
            percent(found.gain_kept_on_fine_tunes(name, budget)),
            number(found.guidance_error(name, budget, [base])),
            number(found.guidance_error(name, budget, found.fine_tunes)),
            number(found.mean(name, budget, lambda run: run.models[found.base].scores.fd_clip), 1),
        ))  # fmt: skip
    return rows


def comparison_table(found: ComparisonResult, budget: str) -> Table:
    """The table for a terminal."""
    steps = found.settings["long_train_steps" if budget == "long" else "max_train_steps"]
    title = f"{BUDGETS[budget]}: {steps} training steps"
    return terminal(title, HEADINGS, cells(found, budget))


def comparison_markdown(found: ComparisonResult, budget: str) -> str:
    """The table for a page."""
    return markdown(HEADINGS, cells(found, budget))


def pareto(found: ComparisonResult, budget: str, theme: Theme = LIGHT) -> Figure:
    """FLOPs of an image against the CFG gain kept: on the base, and mean over the fine-tunes.

    CFG is at (1, 1) by definition and no guidance at (0.5, 0). The default has a larger marker.
    """
    sides = {"base": lambda name: found.gain_kept(name, found.base, budget)}
    if found.fine_tunes:
        sides["fine-tunes"] = lambda name: found.gain_kept_on_fine_tunes(name, budget)
    figure = Figure(figsize=(4.6 * len(sides) + 1.8, 4.2), layout="constrained")
    grid = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, (title, kept) in zip(grid, sides.items(), strict=True):
        clean(axes, theme, "left")
        axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink)
        axes.set_xlabel("FLOPs of an image, CFG = 1", color=theme.ink)
        axes.grid(visible=True, color=theme.faint, lw=0.7)
        axes.set_axisbelow(True)
        for x, y, label in ((1, 1, "CFG"), (0.5, 0, "no guidance")):
            axes.plot(x, y, ls="", marker="*" if y else "x", ms=10, color=theme.ink, label=label)
        for i, (name, method) in enumerate(found.methods.items()):
            if not found.runs(name, budget):
                continue
            axes.plot(
                method.cost.flops_over_none / 2, kept(name), ls="",
                marker=MARKERS[i % len(MARKERS)], color=theme.series[i % len(theme.series)],
                ms=11 if name == found.default else 7, label=method.title,
                markerfacecolor=None if i < len(MARKERS) else "none",
            )  # fmt: skip
    grid[0].set_ylabel("CFG gain kept, top-1", color=theme.ink)
    legend(grid[-1], theme, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(BUDGETS[budget], x=0.01, ha="left", fontsize=11, color=theme.ink)
    return figure
