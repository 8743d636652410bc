"""Plots of a result, as figures without any global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pilotfish.evaluation.images import TITLES
from pilotfish.evaluation.results import Cost, CurveResult, Result
from pilotfish.guidance import GuidanceMode

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
    """A line for each model; the dashed line is no guide."""
    figure, axes = figure_and_axes("Guidance error by guidance scale", "guidance scale w", theme)
    for i, (name, model) in enumerate(result.models.items()):
        pairs = sorted((float(w), e) for w, e in model.guidance_error.by_w.items())
        axes.plot(*zip(*pairs, strict=True), **line_style(theme, i), label=name)
    return _error_axis(figure, axes, theme)


def guidance_error_over_time(result: Result, theme: Theme = LIGHT) -> Figure:
    """A line for each model, from pure noise on the left to the image on the right."""
    title, x = "Guidance error along the trajectory", "time (noise → image)"
    figure, axes = figure_and_axes(title, x, theme)
    for i, (name, model) in enumerate(result.models.items()):
        pairs = sorted((float(t), e) for t, e in model.guidance_error.by_time.items())
        axes.plot(*zip(*pairs, strict=True), **line_style(theme, i, size=3), label=name)
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
    figure, axes = figure_and_axes("Training", "step", theme)
    axes.set_ylabel("guidance error on held-out prompts", color=theme.series[0])
    axes.set_ylim(bottom=0)
    lines = []
    if curves["guidance_error"]:
        points = zip(*curves["guidance_error"], strict=True)
        lines += axes.plot(*points, **line_style(theme, 0), label="guidance error", zorder=3)
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
    """Wall clock of each mode as a share of CFG's, at every batch size; FLOPs beside it."""
    figure, axes = figure_and_axes("Cost, CFG = 1", "", theme)
    groups: dict[str, tuple[float, ...]] = {
        "operations": tuple(cost.flops[mode] / cost.flops["cfg"] for mode in GuidanceMode)
    }
    for batch, ratio in cost.cfg_over_guided.items():
        groups[f"time, batch {batch}"] = (1 / cost.cfg_over_none[batch], 1.0, 1 / ratio)
    for i, (mode, colour) in enumerate(zip(GuidanceMode, (2, 1, 0), strict=True)):
        values = [group[i] for group in groups.values()]
        bars = axes.bar([j + 0.27 * (i - 1) for j in range(len(groups))], values, 0.24,
                        color=theme.series[colour], label=TITLES[mode])  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8, color=theme.ink)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylim(0, 1.25)
    axes.grid(visible=False, axis="x")
    legend(axes, theme, ncols=3, loc="upper center")
    return figure


def curve(result: CurveResult, model: str, theme: Theme = LIGHT) -> Figure:
    """Top-1 and ``fd_clip`` of one model, a line for each method: against the denoiser passes of
    an image, with the number of steps beside each point, or against the guidance scale."""
    by_steps = result.setting == "num_inference_steps"
    figure = Figure(figsize=(2 * SIZE[0] - 2, SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, title, value in (
        (left, "top-1", lambda s: s.top1), (right, "fd_clip", lambda s: s.fd_clip)
    ):  # fmt: skip
        clean(axes, theme, "left")
        axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink)
        x_label = "denoiser passes for an image" if by_steps else "guidance scale w"
        axes.set_xlabel(x_label, color=theme.ink)
        if by_steps:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, color=theme.faint, lw=0.7)
        axes.set_axisbelow(True)
        for i, (method, by_value) in enumerate(result.models[model].items()):
            points = [
                (point.passes if by_steps else float(n), value(point.scores), n)
                for n, point in by_value.items()
            ]
            style = line_style(theme, i)
            axes.plot([p[0] for p in points], [p[1] for p in points], **style, label=method)
            for x, y, n in points if by_steps else ():
                axes.annotate(
                    n, (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=7,
                    color=style["color"],
                )  # fmt: skip
    left.set_ylim(bottom=0)
    legend(left, theme)
    figure.suptitle(model, x=0.01, ha="left", fontsize=11, fontweight="bold", color=theme.ink)
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


def figure_and_axes(title: str, x: str, theme: Theme) -> tuple[Figure, Axes]:
    """A figure with a title and a label of its x-axis."""
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


def line_style(theme: Theme, i: int, size: float = 5) -> dict[str, Any]:
    """Colour and marker of line i."""
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
