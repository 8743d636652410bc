"""What a comparison found, as one picture: how much of CFG's gain is kept, at what cost."""

from __future__ import annotations

from matplotlib.figure import Figure

from baselines.comparison.result import Comparison
from pilotfish.evaluation.plots import LIGHT, MARKERS, Theme, clean, legend


def pareto(found: Comparison, budget: str, theme: Theme = LIGHT) -> Figure:
    """FLOPs of a picture against the gain kept: on the base, and mean over the fine-tunes.

    CFG is at (1, 1) by definition, no guidance at (0.5, 0). The default is drawn larger.
    """
    sides = {"on the base": lambda name: found.kept(name, found.base, budget)}
    if found.fine_tunes:
        sides["on fine-tunes, untouched"] = lambda name: found.kept_on_fine_tunes(name, budget)
    figure = Figure(figsize=(4.6 * len(sides) + 1.8, 4.2), layout="constrained")
    grid = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    for axes, (title, kept) in zip(grid, sides.items(), strict=True):
        clean(axes, theme, "left")
        axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink)
        axes.set_xlabel("FLOPs of a picture, CFG = 1", color=theme.ink)
        axes.grid(visible=True, color=theme.faint, lw=0.7)
        axes.set_axisbelow(True)
        for x, y, label in ((1, 1, "CFG"), (0.5, 0, "no guidance")):
            axes.plot(x, y, ls="", marker="*" if y else "x", ms=10, color=theme.ink, label=label)
        for i, (name, method) in enumerate(found.methods.items()):
            if not found.runs(name, budget):
                continue
            axes.plot(
                method.cost.flops_over_plain / 2, kept(name), ls="",
                marker=MARKERS[i % len(MARKERS)], color=theme.series[i % len(theme.series)],
                ms=11 if name == found.default else 7, label=method.title,
                markerfacecolor=None if i < len(MARKERS) else "none",
            )  # fmt: skip
    grid[0].set_ylabel("share of CFG's gain in prompt score kept", color=theme.ink)
    legend(grid[-1], theme, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(f"Equal {budget}", x=0.01, ha="left", fontsize=11, color=theme.ink)
    return figure
