"""Plots of a result, as figures without any global state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pilotfish.evaluation.results import CurveResult, Result

SIZE = (6.4, 3.8)
DPI = 160


@dataclass(frozen=True)
class Theme:
    """Colours of a plot."""

    ink: str
    faint: str
    series: tuple[str, ...] = (
        "#2f7fd6", "#e0803c", "#3fa672", "#b065c9", "#d65a6b", "#8a8f36", "#2fa3a8",
    )  # fmt: skip


LIGHT = Theme("#26323d", "#d5dbe1")
MARKERS = "osD^vPX"


def guidance_errors(result: Result, theme: Theme = LIGHT) -> Figure:
    """Guidance error by guidance scale, and by time from noise on the left to the image on the
    right: a line for each model; the dashed line is no guide."""
    figure = Figure(figsize=(2 * SIZE[0] - 2, SIZE[1]), layout="constrained")
    for axes, title, x, name in zip(
        figure.subplots(1, 2), ("by guidance scale", "along the trajectory"),
        ("guidance scale w", "time (noise → image)"), ("by_w", "by_time"), strict=True,
    ):  # fmt: skip
        prepare_axes(axes, f"Guidance error {title}", x, theme)
        for i, (model, found) in enumerate(result.models.items()):
            pairs = sorted((float(k), e) for k, e in getattr(found.guidance_error, name).items())
            axes.plot(*zip(*pairs, strict=True), **line_style(theme, i, size=3), label=model)
        axes.axhline(1, color=theme.ink, lw=1, ls=(0, (4, 3)), alpha=0.7, label="no guide")
        axes.set_ylim(bottom=0)
    axes.invert_xaxis()
    legend(axes, theme)
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
        x = "denoiser passes for an image" if by_steps else "guidance scale w"
        prepare_axes(axes, title, x, theme)
        if by_steps:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        for i, (method, by_value) in enumerate(result.models[model].items()):
            points = [
                (point.passes if by_steps else float(n), value(point.scores), n)
                for n, point in by_value.items()
            ]
            style = line_style(theme, i)
            axes.plot([p[0] for p in points], [p[1] for p in points], **style, label=method)
            for at, y, n in points if by_steps else ():
                axes.annotate(
                    n, (at, y), (0, 5), textcoords="offset points", ha="center", fontsize=7,
                    color=style["color"],
                )  # fmt: skip
    left.set_ylim(bottom=0)
    legend(left, theme)
    figure.suptitle(model, x=0.01, ha="left", fontsize=11, fontweight="bold", color=theme.ink)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """A figure as a PNG file on white."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")


def prepare_axes(axes: Axes, title: str, x: str, theme: Theme) -> None:
    """Title, label of the x-axis and grid."""
    clean(axes, theme, "left")
    axes.set_title(title, loc="left", fontsize=10.5, color=theme.ink)
    axes.set_xlabel(x, color=theme.ink)
    axes.grid(visible=True, color=theme.faint, lw=0.7)
    axes.set_axisbelow(True)


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


def legend(axes: Axes, theme: Theme, **where: Any) -> None:
    """A legend without a frame."""
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink, **where)
