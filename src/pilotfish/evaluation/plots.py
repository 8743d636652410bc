"""Plots of a result, as figures without any global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pilotfish.evaluation.inspection import Added
from pilotfish.evaluation.result import Cost, Result, Scores
from pilotfish.evaluation.steps import StepsResult

SIZE = (6.4, 3.8)
DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of a plot. The ground is transparent; ``series`` reads well on both themes."""

    ink: str
    faint: str
    series: tuple[str, ...] = (
        "#2f7fd6", "#e0803c", "#3fa672", "#b065c9", "#d65a6b", "#8a8f36", "#2fa3a8",
    )  # fmt: skip


LIGHT = Theme("#26323d", "#d5dbe1")
DARK = Theme("#dde5ec", "#3c4853")
MARKERS = "osD^vPX"


def guidance_error_over_scale(result: Result, theme: Theme = LIGHT) -> Figure:
    """One line a host; the dashed line is no guide."""
    figure, axes = _axes("Guidance error by guidance scale", "guidance scale w", theme)
    for i, (name, host) in enumerate(result.hosts.items()):
        pairs = sorted((float(w), e) for w, e in host.guidance_error.by_w.items())
        axes.plot(*zip(*pairs, strict=True), **_style(theme, i), label=name)
    return _error_axis(figure, axes, theme)


def guidance_error_over_time(result: Result, theme: Theme = LIGHT) -> Figure:
    """One line a host, from pure noise on the left to the picture on the right."""
    figure, axes = _axes("Guidance error along the trajectory", "time (noise → image)", theme)
    for i, (name, host) in enumerate(result.hosts.items()):
        pairs = sorted((float(t), e) for t, e in host.guidance_error.by_time.items())
        axes.plot(*zip(*pairs, strict=True), **_style(theme, i, size=3), label=name)
    axes.invert_xaxis()
    return _error_axis(figure, axes, theme)


def training_curve(rows: Sequence[Mapping[str, float]], theme: Theme = LIGHT) -> Figure:
    """Loss and guidance error over training.

    Args:
        rows: ``step`` with ``loss``, ``guidance_error`` or both; each is drawn where it is known.

    Raises:
        ValueError: no row holds either.
    """
    curves = {
        name: [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        for name in ("loss", "guidance_error")
    }
    if not any(curves.values()):
        raise ValueError("the training rows hold neither loss nor guidance_error")
    figure, axes = _axes("Training", "step", theme)
    axes.set_ylabel("guidance error on held-out prompts", color=theme.series[0])
    axes.set_ylim(bottom=0)
    lines = []
    if curves["guidance_error"]:
        points = zip(*curves["guidance_error"], strict=True)
        lines += axes.plot(*points, **_style(theme, 0), label="guidance error", zorder=3)
        axes.set_ylim(0, 1.05 * max(1.0, *(e for _, e in curves["guidance_error"])))
    if curves["loss"]:
        right = axes.twinx()
        clean(right, theme, "right")
        right.set_ylabel("loss", color=theme.series[1])
        points = zip(*curves["loss"], strict=True)
        lines += right.plot(*points, color=theme.series[1], lw=1.2, alpha=0.8, label="loss")
        right.set_ylim(bottom=0)
    legend(axes, theme, handles=lines)
    return figure


def cost_bars(cost: Cost, theme: Theme = LIGHT) -> Figure:
    """Wall clock of each way as a share of CFG's, at every batch size; FLOPs beside it."""
    figure, axes = _axes("Cost, CFG = 1", "", theme)
    groups: dict[str, tuple[float, float, float]] = {
        "operations": (cost.flops["plain"] / cost.flops["cfg"], 1.0,
                       cost.flops["guided"] / cost.flops["cfg"]),
    }  # fmt: skip
    for batch, ratio in cost.cfg_over_guided.items():
        groups[f"time, batch {batch}"] = (1 / cost.cfg_over_plain[batch], 1.0, 1 / ratio)
    for i, (way, colour) in enumerate(
        zip(("no guidance", "CFG", "guided"), (theme.series[2], theme.series[1], theme.series[0]),
            strict=True)
    ):  # fmt: skip
        values = [group[i] for group in groups.values()]
        bars = axes.bar([j + 0.27 * (i - 1) for j in range(len(groups))], values, 0.24,
                        color=colour, label=way)  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8, color=theme.ink)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1.25)
    axes.grid(visible=False, axis="x")
    legend(axes, theme, ncols=3, loc="upper center")
    return figure


def sweep_curve(host: str, scores: Mapping[str, Scores], theme: Theme = LIGHT) -> Figure:
    """Top-1, top-5 and, where there are real pictures, ``fd_judge`` of CFG alone, by w."""
    figure, axes = _axes(f"CFG on {host}", "guidance scale w", theme)
    rows = sorted((float(w), s) for w, s in scores.items())
    at = [w for w, _ in rows]
    axes.set_ylabel("retrieval, share of pictures")
    lines = axes.plot(at, [s.prompt_score for _, s in rows], **_style(theme, 0), label="top-1")
    lines += axes.plot(at, [s.top5 for _, s in rows], **_style(theme, 2), label="top-5")
    axes.set_ylim(0, 1)
    if all(math.isfinite(s.fd_judge) for _, s in rows):
        right = axes.twinx()
        clean(right, theme, "right")
        right.set_ylabel("fd_judge")
        lines += right.plot(at, [s.fd_judge for _, s in rows], **_style(theme, 1), label="fd_judge")
        right.set_ylim(bottom=0)
    legend(axes, theme, handles=lines)
    return figure


def step_curves(result: StepsResult, host: str, theme: Theme = LIGHT) -> Figure:
    """Prompt score and ``fd_judge`` of one host against the denoiser passes of a picture, a line
    for each way; a number beside a point is that of its sampling steps."""
    figure = Figure(figsize=(2 * SIZE[0] - 2, SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, title, value in (
        (left, "right name found first", lambda s: s.prompt_score),
        (right, "fd_judge", lambda s: s.fd_judge),
    ):
        clean(axes, theme, "left")
        axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink)
        axes.set_xlabel("denoiser passes of a picture", color=theme.ink)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, color=theme.faint, lw=0.7)
        axes.set_axisbelow(True)
        for i, (way, by_steps) in enumerate(result.hosts[host].items()):
            points = [(cell.passes, value(cell.scores), n) for n, cell in by_steps.items()]
            style = _style(theme, i)
            axes.plot([p[0] for p in points], [p[1] for p in points], **style, label=way)
            for x, y, n in points:
                axes.annotate(
                    n, (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=7,
                    color=style["color"],
                )  # fmt: skip
    left.set_ylim(bottom=0)
    legend(left, theme)
    figure.suptitle(host, x=0.01, ha="left", fontsize=11, fontweight="bold", color=theme.ink)
    return figure


def added_maps(
    found: Sequence[Added], place: str, columns: int = 8, theme: Theme = LIGHT
) -> Figure:
    """What a guide adds at one place: a row for each w, noise on the left; one scale of
    brightness for all."""
    maps = {
        (a.guidance_scale, a.timestep): a.map.numpy()
        for a in found
        if a.place == place and a.map is not None
    }
    steps = sorted({t for _, t in maps}, reverse=True)
    columns = min(columns, len(steps))
    shown = [steps[round(i * (len(steps) - 1) / max(columns - 1, 1))] for i in range(columns)]
    scales = sorted({w for w, _ in maps})
    top = max(float(m.max()) for m in maps.values())
    figure = Figure(figsize=(1.0 * columns + 0.8, 1.0 * len(scales) + 0.8), layout="constrained")
    grid = figure.subplots(len(scales), columns, squeeze=False)
    for row, w in zip(grid, scales, strict=True):
        row[0].set_ylabel(f"w = {w:g}", color=theme.ink)
        for axes, t in zip(row, shown, strict=True):
            axes.imshow(maps[w, t], vmin=0, vmax=top, cmap="magma")
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, t in zip(grid[0], shown, strict=True):
        axes.set_title(f"t = {t}", fontsize=8.5, color=theme.ink)
    figure.suptitle(f"Added at {place}", x=0.01, ha="left", fontsize=11, color=theme.ink)
    return figure


def added_strength(found: Sequence[Added], place: str, theme: Theme = LIGHT) -> Figure:
    """How strong it is at one place over the timesteps, a line for each w."""
    figure, axes = _axes(f"Strength at {place}", "timestep (noise → picture)", theme)
    scales = sorted({a.guidance_scale for a in found})
    for i, w in enumerate(scales):
        here = [a for a in found if a.place == place and a.guidance_scale == w]
        points = sorted((a.timestep, a.strength) for a in here)
        axes.plot(*zip(*points, strict=True), **_style(theme, i, size=3), label=f"w = {w:g}")
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    axes.set_ylabel("root mean square")
    legend(axes, theme)
    return figure


def png(figure: Figure) -> bytes:
    """A figure as PNG on a transparent ground."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, transparent=True)
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """A figure as a PNG file on white."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")


def _axes(title: str, x: str, theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    clean(axes, theme, "left")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.ink)
    axes.set_xlabel(x, color=theme.ink)
    axes.grid(visible=True, color=theme.faint, lw=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def clean(axes: Axes, theme: Theme, side: str) -> None:
    """Two spines, the bottom one and one side; all in the theme's ink."""
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("bottom", side))
        spine.set_color(theme.faint)
    axes.tick_params(colors=theme.ink, which="both", length=3)
    axes.yaxis.label.set_color(theme.ink)


def _style(theme: Theme, i: int, size: float = 5) -> dict[str, Any]:
    count = len(theme.series)
    return {
        "color": theme.series[i % count], "marker": MARKERS[i % len(MARKERS)],
        "ms": size, "lw": 1.8,
    }  # fmt: skip


def _error_axis(figure: Figure, axes: Axes, theme: Theme) -> Figure:
    axes.axhline(1, color=theme.ink, lw=1, ls=(0, (4, 3)), alpha=0.7, label="no guide")
    axes.set_ylabel("guidance error")
    axes.set_ylim(bottom=0)
    legend(axes, theme)
    return figure


def legend(axes: Axes, theme: Theme, **where: Any) -> None:
    """A legend without a frame."""
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink, **where)
