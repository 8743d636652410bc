"""``pilotfish compare --guidances``: guidances beside CFG, with all their passes and as guides.

Each is measured at several w, from the same noise, by the scorer. A guide is measured at the w of
the guidance that it was taught, in one pass a step and with refreshes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from pilotfish import bundled
from pilotfish.cli.names import Dtype, model_sources, open_guide, open_scorer, split_name
from pilotfish.cli.progress import progress_bars
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation.images import ModelScorer
from pilotfish.evaluation.results import (
    PartialResults,
    Point,
    Run,
    Saved,
    Scores,
    machine,
    modules,
    versions,
)
from pilotfish.evaluation.tables import markdown, number, percent
from pilotfish.guidances import CFG, SETTINGS, Guidance
from pilotfish.guides import Guide
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.sampling import Attachable
from pilotfish.teacher import checksum

MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
DECODER = "up_blocks.0.attentions.0.transformer_blocks.0"
"""Of the bundled base."""
SPECS = (
    "cfg", "rescaled:guidance_rescale=0.7", "apg:eta=0", "apg:eta=0,norm_threshold=5",
    "cfg_zero_star", "slg:degraded_scale=0.5", f"slg:degraded_scale=0.5,degraded_layers={DECODER}",
    "pag:degraded_scale=0.5", f"pag:degraded_scale=0.5,degraded_layers={MIDDLE}+{DECODER}",
    "autoguidance", f"autoguidance:degraded_layers={DECODER}",
)  # fmt: skip


@dataclass(frozen=True)
class GuidancesConfig:
    """Measure guidances beside CFG, and guides that were taught them. The same command resumes."""

    rules: tuple[str, ...] = SPECS
    """Guidances, each NAME or NAME:SETTING=VALUE,SETTING=VALUE (lists with +), with @W at the end
    in place of --scales. CFG is always measured."""
    scales: tuple[float, ...] = (2.0, 3.0, 4.0, 6.0)
    """Each w."""
    guides: tuple[str, ...] = ()
    """Guides, NAME=PATH, that were taught one of the guidances."""
    refresh: tuple[int, ...] = (0, 3)
    """Steps of the guides that run all passes."""
    model: str = "base"
    """Bundled model, or folder or hub id."""
    reference_images: str | None = None
    """Folder of real images (metadata.jsonl) for a model that is not bundled."""
    prompts: str | None = None
    """Text file of prompts. Default: the bundled captions."""
    scorer: str | None = None
    """Folder of a CLIP. Default: the bundled one."""
    samples: int = 250
    """Images of each point."""
    seed: int = 0
    num_inference_steps: int = 25
    batch_size: int = 32
    dtype: Dtype = "float32"
    output: str = "results/guidances.json"
    """File of the result."""


@dataclass(frozen=True)
class GuidancePoint:
    """One guidance, or a guide that was taught it, at one w.

    Attributes:
        guidance: its name and settings; ``none`` for the prompt alone.
        name: the guidance's name without settings.
        w: guidance scale.
        passes: of the denoiser for one image, counted; those of a weaker model are not.
        guide: the guide's name; empty for the guidance with all its passes.
        refresh: steps of the guide that run all passes.
    """

    guidance: str
    name: str
    w: float
    passes: float
    scores: Scores
    guide: str = ""
    refresh: int = 0


@dataclass(frozen=True)
class GuidancesResult(Saved):
    """All points, no guidance first."""

    points: list[GuidancePoint]
    run: Run

    def best(self) -> dict[str, GuidancePoint]:
        """Of each guidance the point with the lowest fd_clip, among those whose top-5 is at least
        that of CFG at its own lowest fd_clip; where there is none, that of the highest top-5."""
        whole = [p for p in self.points if not p.guide and p.guidance != "none"]
        cfg = min((p for p in whole if p.name == "cfg"), key=_distance)
        found = {}
        for name in dict.fromkeys(p.name for p in whole):
            mine = [p for p in whole if p.name == name]
            able = [p for p in mine if p.scores.top5 >= cfg.scores.top5]
            found[name] = min(able, key=_distance) if able else max(mine, key=_top5)
        return found


def _distance(point: GuidancePoint) -> float:
    return point.scores.fd_clip


def _top5(point: GuidancePoint) -> float:
    return point.scores.top5


def parse(spec: str) -> tuple[Guidance, float | None]:
    """A guidance and the w after @, where there is one.

    Raises:
        ValueError: an unknown guidance or setting, or a value that is none.
    """
    text, at, w = spec.rpartition("@") if "@" in spec else (spec, "", "")
    name, _, settings = text.partition(":")
    given: dict[str, Any] = {"guidance": name}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        known = SETTINGS.get(name, ())
        if known and key not in known:
            raise ValueError(f"{name} has the settings {', '.join(known)}, not {key!r}")
        if key == "degraded_layers":
            given[key] = value.split("+")
        else:
            given[key] = value if key.startswith("weak_") else float(json.loads(value))
    return Guidance.saved(given), float(w) if at else None


class Measurement:
    """Points of one model, kept as they are finished.

    Args:
        unfinished: their file.
    """

    def __init__(self, config: GuidancesConfig, unfinished: Path, progress: Any) -> None:
        self.config, self.progress = config, progress
        given = [config.reference_images] if config.reference_images else []
        (source,) = model_sources([config.model], given, config.dtype).values()
        self.pipe, scorer = source.load(), open_scorer(config.scorer, [config.model])
        names = load_prompts(config.prompts) if config.prompts else bundled.prompts("captions")
        self.images = ModelScorer(
            self.pipe, scorer, prompts=names, names=names, samples=config.samples,
            reference_images=source.reference_images, seed=config.seed,
            batch_size=config.batch_size,
        )  # fmt: skip
        self.parts = PartialResults(unfinished)
        self.facts = {
            "names": names, "samples": config.samples, "seed": config.seed,
            "steps": config.num_inference_steps, "dtype": config.dtype,
            "weights": self.parts.checksums({**modules(self.pipe), "scorer": scorer.model}),
        }  # fmt: skip

    def point(
        self, guidance: Guidance, w: float, guide: tuple[str, Guide] | None = None, refresh: int = 0
    ) -> GuidancePoint:
        """A guidance with all its passes, or a guide. At w = 1 it is no guidance."""
        name, network = guide or ("", None)
        method: Attachable = Refreshed(network, refresh) if network else Reference(guidance)
        facts = self.facts | {
            "guidance": guidance, "w": w, "refresh": refresh,
            "guide": checksum(network) if network else None,
        }  # fmt: skip
        title = f"{name or guidance.guidance}, w = {w:g}"
        measure = partial(
            self.images.score, w, self.config.num_inference_steps, method, self.progress, title
        )

        def scored() -> Point:
            found = measure()
            return Point(found.passes, found.scores)

        found = self.parts.get(Point, facts, scored)
        text, kind = (str(guidance), guidance.guidance) if w > 1 else ("none", "none")
        return GuidancePoint(text, kind, w, found.passes, found.scores, name, refresh)


def measure(config: GuidancesConfig, command: str, progress: Any = None) -> GuidancesResult:
    """Everything that a configuration names.

    Raises:
        ValueError: a guidance that cannot be read, or a guide that was taught none of them.
    """
    named = [parse(spec) for spec in config.rules]
    if all(guidance != CFG for guidance, _ in named):
        named = [(CFG, None), *named]
    plan = dict.fromkeys((g, s) for g, w in named for s in ((w,) if w else config.scales))
    guides = {name: open_guide(path) for name, path in map(split_name, config.guides)}
    for name, guide in guides.items():
        if guide.guidance not in {guidance for guidance, _ in plan}:
            raise ValueError(f"{name} was taught {guide.guidance}, which is not among --rules")
    measurement = Measurement(config, Path(f"{config.output}.unfinished"), progress)
    points = [measurement.point(CFG, 1.0), *(measurement.point(g, w) for g, w in plan)]
    points += [
        measurement.point(g, w, (name, guide), refresh)
        for name, guide in guides.items()
        for g, w in plan
        if g == guide.guidance
        for refresh in config.refresh
    ]
    run = Run(
        command, config.seed, config.samples, max(w for _, w in plan), config.num_inference_steps,
        machine(), versions(), config.dtype,
    )  # fmt: skip
    return GuidancesResult(points, run)


def table(found: GuidancesResult) -> str:
    """Every point, in Markdown; the best of each guidance is in bold."""
    none, best = found.points[0], set(map(id, found.best().values()))
    rows = []
    for point in found.points:
        own = f"{point.guide}, refresh {point.refresh}" if point.guide else point.guidance
        name = f"**{own}**" if id(point) in best else own
        rows.append(
            (
                name, f"{point.w:g}", f"{point.passes:.0f}", percent(point.scores.top1),
                percent(point.scores.top5), number(point.scores.cosine, 3),
                number(point.scores.fd_clip, 2), *kept(found, none, point),
            )
        )  # fmt: skip
    headings = ("guidance or guide", "w", "passes", "top-1", "top-5", "cosine", "fd_clip",
                "top-1 gain kept", "fd_clip gain kept")  # fmt: skip
    return markdown(headings, rows)


def kept(found: GuidancesResult, none: GuidancePoint, point: GuidancePoint) -> tuple[str, str]:
    """Of a guide, the share of its guidance's gain over none in top-1 and in fd_clip."""
    whole = {(p.guidance, p.w): p for p in found.points if not p.guide}
    teacher = whole.get((point.guidance, point.w))
    if not point.guide or teacher is None:
        return "", ""
    a, b, c = none.scores, point.scores, teacher.scores
    top1, distance = c.top1 - a.top1, c.fd_clip - a.fd_clip
    return (
        percent((b.top1 - a.top1) / top1 if top1 else math.nan),
        percent((b.fd_clip - a.fd_clip) / distance if distance else math.nan),
    )


def main(arguments: Sequence[str]) -> None:
    """Run ``pilotfish compare --guidances``."""
    given = [a for a in arguments if a != "--guidances"]
    config = tyro.cli(
        GuidancesConfig, args=given, prog="pilotfish compare --guidances",
        use_underscores=True, description=GuidancesConfig.__doc__,
    )  # fmt: skip
    with progress_bars() as progress:
        found = measure(config, shlex.join(["pilotfish", "compare", *arguments]), progress)
    found.save(config.output)
    Path(f"{config.output}.unfinished").unlink(missing_ok=True)
    print(table(found))
    print(f"saved {config.output}")
