"""A result as tables, on a terminal and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from pilotfish.evaluation.negative import TOLD, NegativeResult
from pilotfish.evaluation.result import Cost, HostResult, Result, Scores
from pilotfish.evaluation.steps import StepsResult
from pilotfish.evaluation.ways import TITLES, WAYS

LEGEND = (
    '"Right name found": how often a judge, which has no part in training, ranks the prompt first '
    "among all names. *w*: the guidance scale. *Gain kept*: the share of what CFG gains over no "
    "guidance that the guide keeps, with its 95 % interval. *Guidance error*: squared distance of "
    "the guided prediction to CFG's, along CFG trajectories of held-out prompts, relative to that "
    "of no guidance; 0 is perfect."
)
"""What the figures of :func:`markdown_table` are."""


def number(value: float, digits: int = 2) -> str:
    """A figure, or a dash for what is not a number."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    """A share of 1 in per cent, or a dash."""
    return f"{100 * value:.0f} %" if math.isfinite(value) else "–"


def kept(host: HostResult) -> str:
    """The gain kept with its interval: ``81 % (74-88)``."""
    ends = (host.gain_kept_interval.low, host.gain_kept_interval.high)
    if not all(map(math.isfinite, ends)):
        return percent(host.gain_kept)
    return f"{percent(host.gain_kept)} ({100 * ends[0]:.0f}–{100 * ends[1]:.0f})"


def flops(value: float) -> str:
    """Floating-point operations with a unit."""
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} FLOP"


def result_table(result: Result) -> Group:
    """Hosts, then cost."""
    return Group(hosts_table(result), scores_table(result), cost_table(result.cost))


def hosts_table(result: Result) -> Table:
    """One line a host: how near the guide comes to that host's own CFG."""
    guide = result.guide
    table = Table(
        title=f"Guide {guide.name}: {guide.parameters:,} parameters, "
        f"{100 * guide.share:.2f} % of the denoiser"
    )
    table.add_column("host")
    for name in ("guidance error", "latent MSE ratio", "gain kept", "gain kept (cosine)"):
        table.add_column(name, justify="right")
    table.add_column("PSNR none / guided", justify="right")
    for name, host in result.hosts.items():
        pair = (host.agreement[way].psnr for way in ("none", "guided"))
        table.add_row(
            name, number(host.guidance_error.mean, 3), number(host.latent_mse_ratio, 3),
            kept(host), percent(host.gain_kept_cosine),
            " / ".join(number(p, 1) for p in pair),
        )  # fmt: skip
    return table


def scores_table(result: Result) -> Table:
    """Three lines a host: the judge's scores without guidance, with CFG, guided."""
    table = Table(title=f"w = {result.run.guidance_scale:g}, {result.run.samples} samples")
    table.add_column("host")
    table.add_column("")
    for name in ("top-1", "top-5", "cosine", "fd_judge"):
        table.add_column(name, justify="right")
    for name, host in result.hosts.items():
        for i, way in enumerate(WAYS):
            cells = score_cells(getattr(host, way))
            table.add_row("" if i else name, TITLES[way], *cells, end_section=i == 2)
    return table


def score_cells(scores: Scores) -> tuple[str, str, str, str]:
    """Top-1, top-5, cosine and Fréchet distance as text."""
    return (
        percent(scores.prompt_score), percent(scores.top5),
        number(scores.cosine, 3), number(scores.fd_judge, 1),
    )  # fmt: skip


STEP_HEADINGS = ("", "steps", "passes", "time", "top-1", "top-5", "fd_judge", "of CFG's top-1",
                 "of CFG's fd_judge")  # fmt: skip


def step_rows(result: StepsResult, host: str) -> list[tuple[str, ...]]:
    """One line for each way and number of steps. Time is that of a call; it and the last two
    columns are beside CFG with the most steps."""
    ways = result.hosts[host]
    longest = ways["cfg"][max(ways["cfg"], key=int)].scores
    rows: list[tuple[str, ...]] = []
    for way, by_steps in ways.items():
        for n, cell in by_steps.items():
            scores = cell.scores
            rows.append((
                TITLES.get(way, way), n, f"{cell.passes:g}",
                number(result.wall_clock[way][n]),
                percent(scores.prompt_score), percent(scores.top5), number(scores.fd_judge, 1),
                percent(scores.prompt_score / longest.prompt_score)
                if longest.prompt_score else number(math.nan),
                number(scores.fd_judge / longest.fd_judge),
            ))  # fmt: skip
    return rows


def steps_table(result: StepsResult, host: str) -> Table:
    """Scores against steps on one host, for a terminal."""
    title = f"{host}, w = {result.run.guidance_scale:g}, {result.run.samples} samples"
    return terminal(title, STEP_HEADINGS, step_rows(result, host))


def steps_markdown(result: StepsResult, host: str) -> str:
    """The same for a page."""
    return markdown(STEP_HEADINGS, step_rows(result, host))


def terminal(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows for a terminal; all but the first column are figures."""
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


def cost_table(cost: Cost) -> Table:
    """Passes, FLOPs and wall clock of a plain pass, CFG and the guide."""
    table = Table(title="Cost")
    table.add_column("")
    for way in ("no guidance", "CFG", "guided"):
        table.add_column(way, justify="right")
    for cells in cost_rows(cost):
        table.add_row(*cells)
    return table


def cost_rows(cost: Cost) -> list[tuple[str, str, str, str]]:
    """The lines of a cost table: what, no guidance, CFG, guided."""
    passes, work = cost.passes, cost.flops
    rows = [
        ("denoiser passes a picture",
         *(f"{passes[way]:g}" for way in ("plain", "cfg", "guided"))),
        ("operations a step", *(flops(work[way]) for way in ("plain", "cfg", "guided"))),
    ]  # fmt: skip
    rows += [
        (f"speed-up over CFG, batch {batch}",
         f"{number(cost.cfg_over_plain[batch])}×", "1×", f"{number(ratio)}×")
        for batch, ratio in cost.cfg_over_guided.items()
    ]  # fmt: skip
    return [(what, plain, cfg, guided) for what, plain, cfg, guided in rows]


def markdown_table(result: Result) -> str:
    """The result in short, for a README: one line a host."""
    w, cost = result.run.guidance_scale, result.cost
    lines = [
        f"| w = {w:g} | no guidance | CFG | **guided** | gain kept | guidance error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, host in result.hosts.items():
        cells = [percent(getattr(host, way).prompt_score) for way in WAYS]
        cells[-1] = f"**{cells[-1]}**"
        cells += [kept(host), number(host.guidance_error.mean)]
        lines.append(f"| right name found, {name} | " + " | ".join(cells) + " |")
    passes = (f"{cost.passes[way]:g}" for way in ("plain", "cfg", "guided"))
    lines.append("| denoiser passes | {} | {} | **{}** | | |".format(*passes))
    for batch, guided in cost.cfg_over_guided.items():
        plain = number(cost.cfg_over_plain[batch])
        lines.append(f"| speed, batch {batch} | {plain}× | 1× | **{number(guided)}×** | | |")
    return "\n".join(lines) + "\n"


def negatives_table(result: NegativeResult) -> Table:
    """One line a host: guidance errors, and how near pictures come to CFG's with the same
    negative prompt, where the guide is told it and where it is not."""
    table = Table(title=f"Negative prompts, guide {result.guide.name}")
    table.add_column("host")
    for name in ("error, null", "told", "ignoring", "PSNR told / ignoring", "cosine"):
        table.add_column(name, justify="right")
    for name, host in result.hosts.items():
        both = [host.agreement[way] for way in TOLD]
        table.add_row(
            name,
            number(host.null.mean, 3),
            f"{number(host.told.mean, 3)} ({number(host.ratio)}x)",
            f"{number(host.ignoring.mean, 3)} ({number(host.ratio_ignoring)}x)",
            " / ".join(number(a.psnr, 1) for a in both),
            " / ".join(number(a.cosine) for a in both),
        )
    return table
