"""The result as tables, beside the figures that others published."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Group

from pilotfish.evaluation.protocols.definitions import PROTOCOLS
from pilotfish.evaluation.protocols.results import (
    ComplianceResult,
    ComplianceRow,
    ProtocolResult,
    ProtocolRow,
    ProtocolRun,
)
from pilotfish.evaluation.tables import markdown, number, percent, terminal, with_interval

DICE = "arXiv 2502.03726"


@dataclass(frozen=True)
class Published:
    """A figure of others: Stable Diffusion 1.5, COCO 2017, 20 steps of DPM-Solver++.

    Attributes:
        method: and the paper that proposes it.
        passes: of the denoiser.
        clip_score: as published.
        kept: share of CFG's gain in CLIP score over no guidance.
        fid: as published.
        source: where the figures are from.
    """

    method: str
    passes: str
    clip_score: float
    kept: float
    fid: float
    source: str


PUBLISHED = (
    Published("CFG", "40", 30.22, math.nan, 22.04, DICE),
    Published("Guided Distillation (arXiv 2210.03142)", "20", 28.02, 0.73, 23.54, DICE),
    Published(
        "Plug-and-Play, full guide (arXiv 2406.01954)", "20 (28 with its guide)",
        27.72, 0.70, 26.57, DICE,
    ),
    Published("DICE (arXiv 2502.03726)", "20", 28.54, 0.80, 22.22, DICE),
)  # fmt: skip
NOTE = (
    "These figures are from runs of other people with their own training, CLIP, reference and "
    "guidance scale: compare shares rather than scores. Guided Distillation and Plug-and-Play are "
    "as the authors of DICE implemented them."
)
GAIN = ("method", "passes", "CLIP score", "CFG gain kept", "FID", "PickScore", "CFG gain kept")
COMPLIANCE = (
    "method", "passes", "similarity without", "with negative prompt", "suppression",
    "of CFG's suppression", "CLIP score",
)  # fmt: skip


def gain_cells(row: ProtocolRow) -> tuple[str, ...]:
    """A row under :data:`GAIN`."""
    clip, pick = (row.scores.get(name) for name in ("clip_score", "pickscore"))
    scores = [
        (number(gain.mean), with_interval(gain.kept, gain.interval.low, gain.interval.high))
        if gain
        else ("–", "–")
        for gain in (clip, pick)
    ]
    return row.title, f"{row.passes:g}", *scores[0], number(row.fid), *scores[1]


def compliance_cells(row: ComplianceRow) -> tuple[str, ...]:
    """A row under :data:`COMPLIANCE`."""
    return (
        row.title, f"{row.passes:g}", number(row.without), number(row.with_negative),
        number(row.suppression), with_interval(row.kept, row.interval.low, row.interval.high),
        number(row.clip_score),
    )  # fmt: skip


def published_rows() -> list[tuple[str, ...]]:
    """The figures of others: method, passes, CLIP score, share, FID, source."""
    return [
        (p.method, p.passes, number(p.clip_score), percent(p.kept), number(p.fid), p.source)
        for p in PUBLISHED
    ]


PUBLISHED_HEADINGS = ("published", "passes", "CLIP score", "CFG gain kept", "FID", "source")


def model_tables(
    result: ProtocolResult | ComplianceResult,
) -> tuple[tuple[str, ...], dict[str, list[tuple[str, ...]]]]:
    """The headings, and the rows of each model."""
    if isinstance(result, ComplianceResult):
        return COMPLIANCE, {
            model: [compliance_cells(row) for row in rows.values()]
            for model, rows in result.models.items()
        }
    return GAIN, {
        model: [gain_cells(row) for row in rows.values()] for model, rows in result.models.items()
    }


def protocol_table(result: ProtocolResult | ComplianceResult) -> Group:
    """A table for each model, for a terminal."""
    headings, tables = model_tables(result)
    found = [terminal(model, headings, rows) for model, rows in tables.items()]
    if result.run.protocol == "coco2017":
        found.append(terminal(NOTE, PUBLISHED_HEADINGS, published_rows()))
    return Group(settings_text(result.run), *found)


def protocol_markdown(result: ProtocolResult | ComplianceResult) -> str:
    """A page: how it was measured, a table for each model, the figures of others."""
    headings, tables = model_tables(result)
    lines = [f"# {_title(result.run)}", settings_text(result.run), f"`{result.run.command}`"]
    for model, rows in tables.items():
        lines += [f"## {model}", markdown(headings, rows).rstrip()]
    lines.append(_legend(result))
    if result.run.protocol == "coco2017":
        lines += ["## Published, Stable Diffusion 1.5", NOTE]
        lines.append(markdown(PUBLISHED_HEADINGS, published_rows()).rstrip())
    return "\n\n".join(lines) + "\n"


def settings_text(run: ProtocolRun) -> str:
    """How the images were made, in a sentence."""
    schedulers = ", ".join(dict.fromkeys(run.schedulers.values()))
    reference = f", {run.reference_images:,} reference images" if run.reference_images else ""
    return (
        f"{_title(run)}: {run.samples:,} images of each method, w = {run.guidance_scale:g}, "
        f"{run.num_inference_steps} steps of {schedulers}, seed {run.seed}, {run.dtype}"
        f"{reference}, on {run.machine}."
    )


def _title(run: ProtocolRun) -> str:
    return next(protocol.title for name, protocol in PROTOCOLS.items() if name == run.protocol)


def _legend(result: ProtocolResult | ComplianceResult) -> str:
    if isinstance(result, ComplianceResult):
        return (
            "*Similarity*: 100 times the cosine of image and negative prompt in CLIP, of images "
            "without and with that negative prompt from the same seeds. *Suppression*: their "
            "difference. After the share of CFG's suppression its 95 % interval over prompts. "
            "*CLIP score*: 100 times the cosine of image and prompt, with the negative prompt."
        )
    return (
        "*CLIP score*: 100 times the cosine of image and prompt. *CFG gain kept*: the share of "
        "CFG's gain over no guidance in the score before it, with its 95 % interval over prompts. "
        "*Passes*: of the denoiser for an image, counted; the work of the guide is not in them."
    )
