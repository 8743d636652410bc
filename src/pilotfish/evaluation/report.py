"""A report: one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from pilotfish.evaluation import plots
from pilotfish.evaluation.results import Result
from pilotfish.evaluation.tables import (
    AGREEMENT,
    agreement_rows,
    cost_rows,
    number,
    percent,
    score_rows,
)
from pilotfish.guidance import GuidanceMode

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Plot:
    """A plot on a light and on a dark background, as data URIs."""

    title: str
    light: str
    dark: str


def render(
    result: Result,
    *,
    fresh: Result | None = None,
    grids: Mapping[str, Image.Image] | None = None,
    training: Sequence[Mapping[str, float]] | None = None,
    title: str = "One pass instead of two",
) -> str:
    """The report as HTML.

    Args:
        result: of the guide that is shown first, such as the bundled one.
        fresh: of a guide that has just been distilled, shown beside it.
        grids: images by caption.
        training: rows of the training curve; see :func:`pilotfish.evaluation.plots.training_curve`.
    """
    figures: dict[str, Callable[[plots.Theme], Figure]] = {
        "Guidance error by guidance scale":
            lambda theme: plots.guidance_error_over_scale(result, theme),
        "Guidance error along the trajectory":
            lambda theme: plots.guidance_error_over_time(result, theme),
        "Cost of the guidance modes": lambda theme: plots.cost_bars(result.cost, theme),
    }  # fmt: skip
    if training:
        figures["Training"] = lambda theme: plots.training_curve(training, theme)
    guides = {"": result} if fresh is None else {"bundled": result, "fresh": fresh}
    page: str = _template().render(
        title=title,
        result=result,
        fresh=fresh,
        tiles=_tiles(result),
        headings=AGREEMENT,
        agreement=_agreement(guides),
        scores=_scores(result),
        grids=[(name, _address(_image(image))) for name, image in (grids or {}).items()],
        plots=[_plot(name, draw) for name, draw in figures.items()],
        cost=cost_rows(result.cost),
    )
    return page


def write(path: str | Path, result: Result, **parts: Any) -> None:
    """Write :func:`render` to a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result, **parts), encoding="utf-8")


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE.name)


def _tiles(result: Result) -> list[tuple[str, str]]:
    """The few figures at the top: value, what it is."""
    base, cost = next(iter(result.models.values())), result.cost
    tiles = [
        (f"{cost.passes['guided']:g} / {cost.passes['cfg']:g}", "denoiser passes, guided / CFG"),
        (f"{100 * result.guide.share:.2f} %", "of the denoiser's parameters"),
        (percent(base.gain_kept), "of CFG's gain in top-1 retained"),
        (number(base.guidance_error.mean), "guidance error (0 is CFG, 1 no guide)"),
    ]
    if cost.cfg_over_guided:
        batch, ratio = list(cost.cfg_over_guided.items())[-1]
        tiles.insert(1, (f"{number(ratio)}×", f"faster than CFG at batch {batch}"))
    return tiles


def _agreement(guides: Mapping[str, Result]) -> list[dict[str, Any]]:
    """One row for each model and guide."""
    rows = {name: {row[0]: row[1:] for row in agreement_rows(r)} for name, r in guides.items()}
    models = dict.fromkeys(model for of_guide in rows.values() for model in of_guide)
    return [
        {"model": "" if i else model, "guide": guide, "cells": rows[guide][model]}
        for model in models
        for i, guide in enumerate(g for g in guides if model in rows[g])
    ]


def _scores(result: Result) -> list[dict[str, Any]]:
    modes = len(GuidanceMode)
    return [
        {"model": "" if i % modes else model, "mode": mode, "cells": cells}
        for i, (model, mode, cells) in enumerate(score_rows(result))
    ]


def _plot(title: str, draw: Callable[[plots.Theme], Figure]) -> Plot:
    light, dark = (_address(plots.png(draw(theme))) for theme in (plots.LIGHT, plots.DARK))
    return Plot(title, light, dark)


def _image(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _address(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
