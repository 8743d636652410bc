"""Results as tables, on a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from pilotfish.evaluation.images import TITLES
from pilotfish.evaluation.results import (
    Cost,
    CurveResult,
    ModelResult,
    NegativeResult,
    Result,
    Scores,
)
from pilotfish.guidance import GuidanceMode

LEGEND = (
    "*Top-1*: retrieval accuracy, the share of images whose prompt a small CLIP ranks first among "
    "all names; it takes no part in training. *w*: the guidance scale. *CFG gain kept*: the "
    "share of CFG's gain in top-1 over no guidance, with its 95 % interval. *Guidance error*: "
    "squared distance of the guided prediction to CFG's, along CFG trajectories of held-out "
    "prompts, relative to that without guidance; 0 is CFG."
)
"""The columns of :func:`markdown_table`."""


def number(value: float, digits: int = 2) -> str:
    """A figure, or a dash for what is not a number."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    """A share of 1 in per cent, or a dash."""
    return f"{100 * value:.0f} %" if math.isfinite(value) else "–"


def with_interval(value: float, low: float, high: float) -> str:
    """A share of 1 in per cent with its interval, ``81 % (74–88)``; without it where an end is not
    a number, and a dash where the share is none."""
    if not math.isfinite(value + low + high):
        return percent(value)
    return f"{percent(value)} ({100 * low:.0f}–{100 * high:.0f})"


def kept(model: ModelResult) -> str:
    """The CFG gain kept, with its interval."""
    interval = model.gain_kept_interval
    return with_interval(model.gain_kept, interval.low, interval.high)


def flops(value: float) -> str:
    """Floating-point operations with a unit."""
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} FLOP"


def terminal(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows for a terminal; the first column is text, the others are figures."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same rows for a page."""
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def result_table(result: Result) -> Group:
    """Agreement with CFG, then scores, then cost."""
    guide, run = result.guide, result.run
    size = f"{guide.parameters:,} parameters, {guide.share:.2%} of the denoiser"
    return Group(
        terminal(f"Guide {guide.name}: {size}", ("model", *AGREEMENT), agreement_rows(result)),
        terminal(
            f"w = {run.guidance_scale:g}, {run.samples} samples"
            + ("" if run.guidance == "cfg" else f"; for CFG read {run.guidance}"),
            ("model, mode", "top-1", "top-5", "cosine", "fd_clip"),
            [(f"{model}, {mode}", *cells) for model, mode, cells in score_rows(result)],
        ),
        cost_table(result.cost),
    )


AGREEMENT = ("guidance error", "latent MSE ratio", "CFG gain kept", "by cosine",
             "PSNR none / guided", "SSIM", "cosine to CFG")  # fmt: skip


def agreement_rows(result: Result) -> list[tuple[str, ...]]:
    """A row for each model: how near the guide is to the model's own CFG."""
    return [
        (
            name, number(model.guidance_error.mean, 3), number(model.latent_mse_ratio, 3),
            kept(model), percent(model.gain_kept_cosine),
            " / ".join(number(model.agreement[mode].psnr, 1) for mode in ("none", "guided")),
            number(model.agreement["guided"].ssim), number(model.agreement["guided"].cosine),
        )
        for name, model in result.models.items()
    ]  # fmt: skip


def score_rows(result: Result) -> list[tuple[str, str, tuple[str, ...]]]:
    """(model, title of the mode, scores) for each model and mode."""
    return [
        (name, TITLES[mode], score_cells(model.scores[mode]))
        for name, model in result.models.items()
        for mode in GuidanceMode
    ]


def score_cells(scores: Scores) -> tuple[str, ...]:
    """Top-1, top-5, cosine and Fréchet distance as text."""
    return (
        percent(scores.top1), percent(scores.top5),
        number(scores.cosine, 3), number(scores.fd_clip, 1),
    )  # fmt: skip


def cost_table(cost: Cost) -> Table:
    """Passes, FLOPs and wall clock in each mode."""
    return terminal("Cost", ("", *TITLES.values()), cost_rows(cost))


def cost_rows(cost: Cost) -> list[tuple[str, str, str, str]]:
    """The rows of a cost table: what, no guidance, CFG, guided."""
    passes, work = cost.passes, cost.flops
    rows = [
        ("denoiser passes for an image", *(f"{passes[mode]:g}" for mode in GuidanceMode)),
        ("operations for a step", *(flops(work[mode]) for mode in GuidanceMode)),
    ]
    rows += [
        (f"speed-up over CFG, batch {batch}",
         f"{number(cost.cfg_over_none[batch])}×", "1×", f"{number(ratio)}×")
        for batch, ratio in cost.cfg_over_guided.items()
    ]  # fmt: skip
    return [(what, none, cfg, guided) for what, none, cfg, guided in rows]


def markdown_table(result: Result) -> str:
    """The result in short, for a README: a row for each model."""
    w, cost = result.run.guidance_scale, result.cost
    lines = [
        f"| w = {w:g} | no guidance | CFG | **guided** | CFG gain kept | guidance error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, model in result.models.items():
        cells = [percent(model.scores[mode].top1) for mode in GuidanceMode]
        cells[-1] = f"**{cells[-1]}**"
        cells += [kept(model), number(model.guidance_error.mean)]
        lines.append(f"| top-1, {name} | " + " | ".join(cells) + " |")
    passes = (f"{cost.passes[mode]:g}" for mode in GuidanceMode)
    lines.append("| denoiser passes | {} | {} | **{}** | | |".format(*passes))
    for batch, guided in cost.cfg_over_guided.items():
        none = number(cost.cfg_over_none[batch])
        lines.append(f"| speed, batch {batch} | {none}× | 1× | **{number(guided)}×** | | |")
    return "\n".join(lines) + "\n"


def curve_headings(result: CurveResult) -> tuple[str, ...]:
    """Of :func:`curve_rows`."""
    if result.setting == "guidance_scale":
        return ("", "w", "passes", "top-1", "top-5", "cosine", "fd_clip")
    return ("", "steps", "passes", "time", "top-1", "top-5", "fd_clip", "of CFG's top-1",
            "of CFG's fd_clip")  # fmt: skip


def curve_rows(result: CurveResult, model: str) -> list[tuple[str, ...]]:
    """A row for each method and value. Time, and the last two columns, are relative to CFG with
    the most steps."""
    methods = result.models[model]
    rows: list[tuple[str, ...]] = []
    if result.setting == "guidance_scale":
        return [
            (TITLES.get(method, method), w, f"{point.passes:g}", *score_cells(point.scores))
            for method, points in methods.items()
            for w, point in points.items()
        ]
    longest = methods["cfg"][max(methods["cfg"], key=int)].scores
    for method, points in methods.items():
        for n, point in points.items():
            scores = point.scores
            rows.append((
                TITLES.get(method, method), n, f"{point.passes:g}",
                number(result.wall_clock[method][n]),
                percent(scores.top1), percent(scores.top5), number(scores.fd_clip, 1),
                percent(scores.top1 / longest.top1 if longest.top1 else math.nan),
                number(scores.fd_clip / longest.fd_clip),
            ))  # fmt: skip
    return rows


def curve_table(result: CurveResult, model: str) -> Table:
    """Scores against the setting on one model, for a terminal."""
    title = f"{model}, {result.run.samples} samples"
    if result.setting == "num_inference_steps":
        title = f"{model}, w = {result.run.guidance_scale:g}, {result.run.samples} samples"
    return terminal(title, curve_headings(result), curve_rows(result, model))


def curve_markdown(result: CurveResult, model: str) -> str:
    """The same for a page."""
    return markdown(curve_headings(result), curve_rows(result, model))


def negatives_table(result: NegativeResult) -> Table:
    """A row for each model: guidance errors, and agreement with CFG of the same negative prompt,
    of the guide conditioned on it, of the guide that ignores it and of no guidance; then the
    agreement with CFG of the null prompt, of the guide with the same and of no guidance."""
    rows = []
    for name, model in result.models.items():
        negative = [model.agreement[kind] for kind in ("conditioned", "ignoring", "none")]
        null = [model.agreement[kind] for kind in ("null", "none_null")]
        rows.append((
            name,
            number(model.null.mean, 3),
            f"{number(model.conditioned.mean, 3)} ({number(model.ratio)}×)",
            f"{number(model.ignoring.mean, 3)} ({number(model.ratio_ignoring)}×)",
            " / ".join(number(a.psnr, 1) for a in negative),
            " / ".join(number(a.psnr, 1) for a in null),
            " / ".join(number(a.cosine) for a in negative),
        ))  # fmt: skip
    headings = ("model", "error, null prompt", "conditioned", "ignoring",
                "PSNR conditioned / ignoring / none", "PSNR null / none", "cosine")  # fmt: skip
    return terminal(f"Negative prompts, guide {result.guide.name}", headings, rows)
