"""The frontier as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from baselines.frontier.methods import title
from baselines.frontier.results import FrontierEntry, FrontierResult
from pilotfish import bundled
from pilotfish.evaluation.plots import LIGHT, MARKERS, Theme, legend, prepare_axes
from pilotfish.evaluation.tables import markdown, number, percent, with_interval

Groups = Mapping[str, Sequence[str]]
"""Columns of table and plot: the models of each, of which the mean is shown."""
DASHES = ("-", "--", ":")
LOWEST = 1e-3
"""The least distance in the plot; what is nearer to CFG is below it."""


def groups(found: FrontierResult, base: str, far: Sequence[str] = ()) -> dict[str, list[str]]:
    """The base, its fine-tunes, and those that are far from it, as far as they are measured."""
    near = [name for name in found.models if name != base and name not in far]
    every = {"base": [base], "fine-tunes": near, "far fine-tunes": list(far)}
    kept = {k: [name for name in v if found.models.get(name)] for k, v in every.items()}
    return {k: v for k, v in kept.items() if v}


def mean(
    found: FrontierResult, models: Sequence[str], like: FrontierEntry,
    value: Callable[[FrontierEntry], float],
) -> float:  # fmt: skip
    """The mean over models of a figure of the entry that is ``like`` this one; NaN where one lacks
    it. The mean of the ends of intervals is an interval that is too wide rather than too narrow:
    the models share their prompts."""
    entries = [found.find(model, like.key) for model in models]
    known = [value(entry) for entry in entries if entry is not None]
    return fmean(known) if known and len(known) == len(entries) else math.nan


def _measured(found: FrontierResult, models: Sequence[str], like: FrontierEntry) -> bool:
    """Whether all models have the entry."""
    return all(found.find(model, like.key) is not None for model in models)


def points(found: FrontierResult) -> list[FrontierEntry]:
    """One entry of each key, those of a method together and by passes."""
    last_first = [*found.models.values()][::-1]  # of a key the first model's entry is kept
    every = {entry.key: entry for entries in last_first for entry in entries[::-1]}
    order = list(dict.fromkeys(entry.method for v in found.models.values() for entry in v))
    return sorted(every.values(), key=lambda e: (order.index(e.method), e.steps, e.passes))


def frontier_markdown(found: FrontierResult, columns: Groups) -> str:
    """A line for each entry that is measured on all models of a column. FLOPs and speed are
    relative to CFG with the steps of the run. Columns of cost without any figure are left out."""
    headings = ["method", "second passes", "steps", "passes", "FLOPs", "speed, 1", "speed, 8"]
    headings += [f"kept, {name}" for name in columns]
    headings += [f"latent MSE, {name}" for name in columns]
    headings += ["fd_clip, base", "images"]
    steps, rows = found.run.num_inference_steps, list[tuple[str, ...]]()
    for entry in points(found):
        if not any(_measured(found, models, entry) for models in columns.values()):
            continue
        fd = mean(found, columns.get("base", ()), entry, lambda e: e.fd)
        work = entry.flops_over_none * entry.steps / (2 * steps)
        rows.append((
            title(entry.method), _second_passes(entry), str(entry.steps),
            f"{mean_passes(found, entry):.4g}", percent(work),
            *(f"{entry.cfg_over_it[b]:.2f}×" if entry.has_cost else "–" for b in ("1", "8")),
            *(_kept(found, models, entry) for models in columns.values()),
            *(
                number(mean(found, models, entry, lambda e: e.latent_mse_ratio), 3)
                for models in columns.values()
            ),
            number(fd, 1), str(entry.samples),
        ))  # fmt: skip
    costs = range(4, 7)
    shown = [i for i in range(len(headings)) if i not in costs or any(r[i] != "–" for r in rows)]
    return markdown([headings[i] for i in shown], [[row[i] for i in shown] for row in rows])


def summary(
    found: FrontierResult, columns: Mapping[str, tuple[str, int]], models: Sequence[str]
) -> FrontierResult:
    """The entries of :func:`summary_markdown`, in the order of its columns.

    Raises:
        KeyError: one of them is not measured.
    """
    steps = found.run.num_inference_steps
    return found.only(
        {
            model: [
                (bundled.guide_of(model) if method == "guide" else method, str(refresh), "", steps)
                for method, refresh in columns.values()
            ]
            for model in models
        }
    )


def summary_markdown(
    found: FrontierResult, columns: Mapping[str, tuple[str, int]], models: Sequence[str],
    bold: str = "",
) -> str:  # fmt: skip
    """A column for each of a few entries: top-1 accuracy and the CFG gain kept on each model, and
    passes.

    Args:
        columns: title -> method and steps with both passes; ``guide`` is the bundled guide of each
            model.
        models: each base first.
        bold: title of the column to be stressed.

    Raises:
        KeyError: one of them is not measured.
    """
    chosen = summary(found, columns, models)

    def row(title: str, model: str, cell: Callable[[FrontierEntry], str]) -> tuple[str, ...]:
        cells = dict(zip(columns, map(cell, chosen.models[model]), strict=True))
        return title, *(f"**{c}**" if name == bold else c for name, c in cells.items())

    rows = [row(f"top-1, {model}", model, _with_gain) for model in models]
    rows.append(row("denoiser passes", models[0], lambda e: f"{e.passes:g}"))
    run = found.run
    return markdown(
        [f"w = {run.guidance_scale:g}, {run.num_inference_steps} steps", *columns], rows
    )


def _second_passes(entry: FrontierEntry) -> str:
    known = [] if math.isnan(entry.refresh) else [f"{entry.refresh:g}"]
    return ", ".join([*known, *([entry.setting] if entry.setting else [])])


def _with_gain(entry: FrontierEntry) -> str:
    if entry.method in ("none", "cfg"):
        return percent(entry.top1)
    return f"{percent(entry.top1)}, {with_interval(entry.gain_kept, *entry.interval)}"


def mean_passes(found: FrontierResult, entry: FrontierEntry) -> float:
    """Its passes, mean over the models that have it."""
    same = (found.find(model, entry.key) for model in found.models)
    return fmean(one.passes for one in same if one is not None)


def _kept(found: FrontierResult, models: Sequence[str], entry: FrontierEntry) -> str:
    return with_interval(*(mean(found, models, entry, kind) for kind in (_gain, _low, _high)))


def _gain(entry: FrontierEntry) -> float:
    return entry.gain_kept


def _low(entry: FrontierEntry) -> float:
    return entry.interval[0]


def _high(entry: FrontierEntry) -> float:
    return entry.interval[1]


def frontier_plot(
    found: FrontierResult, columns: Groups, ours: Sequence[str], theme: Theme = LIGHT
) -> Figure:
    """Passes of an image against the CFG gain kept, with intervals, and against the distance
    of the final latents to CFG's. A column for each group of models, a line for each method.

    Args:
        ours: the methods whose lines are wide.
    """
    figure = Figure(figsize=(4.4 * len(columns) + 2.2, 7.4), layout="constrained")
    grid = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    lines: dict[str, list[FrontierEntry]] = {}
    for entry in points(found):
        if entry.method not in ("none", "cfg"):
            few = "" if entry.steps == found.run.num_inference_steps else f", {entry.steps} steps"
            where = f", {entry.setting}" if entry.method in ours and entry.setting else ""
            lines.setdefault(title(entry.method) + few + where, []).append(entry)
    for (above, below), (name, models) in zip(grid.T, columns.items(), strict=True):
        prepare_axes(above, name, "", theme)
        prepare_axes(below, "", "denoiser passes of an image", theme)
        below.set_yscale("log")
        below.set_ylim(LOWEST, 2)
        for axes in (above, below):
            axes.axhline(1, color=theme.ink, lw=1, ls=(0, (4, 3)), alpha=0.7)
        for i, (label, entries) in enumerate(lines.items()):
            _line(found, models, (above, below), label, entries, i, theme, ours)
    grid[0][0].set_ylabel("CFG gain kept, top-1", color=theme.ink)
    grid[1][0].set_ylabel("distance to CFG's latents, no guidance = 1", color=theme.ink)
    low = min((e.gain_kept for v in found.models.values() for e in v), default=0.0)
    grid[0][0].set_ylim(max(-0.1, min(0.0, low - 0.05)), 1.2)
    legend(grid[0][-1], theme, loc="center left", bbox_to_anchor=(1.02, 0.3))
    return figure


def _line(
    found: FrontierResult, models: Sequence[str], axes: tuple[Axes, Axes], label: str,
    entries: Sequence[FrontierEntry], i: int, theme: Theme, ours: Sequence[str],
) -> None:  # fmt: skip
    """One method in both plots of a group."""
    passes, gain, low, high, distance = (
        [mean(found, models, entry, value) for entry in entries]
        for value in (lambda e: e.passes, _gain, _low, _high, lambda e: e.latent_mse_ratio)
    )
    wide = entries[0].method in ours
    style: dict[str, Any] = {
        "color": theme.series[i % len(theme.series)], "marker": MARKERS[i % len(MARKERS)],
        "ls": DASHES[i // len(theme.series) % len(DASHES)], "ms": 5 if wide else 3.5,
        "lw": 2.4 if wide else 1.2, "label": label, "zorder": 3 if wide else 2,
    }  # fmt: skip
    # a bar must not be negative, and rounding can make it so
    errors = np.maximum(np.nan_to_num([np.subtract(gain, low), np.subtract(high, gain)]), 0)
    axes[0].errorbar(passes, gain, yerr=errors, elinewidth=0.8, capsize=1.5, **style)
    axes[1].plot(passes, distance, **style)
