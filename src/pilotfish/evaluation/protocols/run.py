"""A protocol from its prompts to its result: first all images, then all scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from pilotfish.data.prompts import fingerprint
from pilotfish.evaluation.images import (
    ModelSource,
    Progress,
    named_progress,
    spread_prompts,
)
from pilotfish.evaluation.metrics import gain_kept, gain_kept_interval
from pilotfish.evaluation.processes import total_batch_size
from pilotfish.evaluation.protocols.definitions import PROTOCOLS, Case, ProtocolName
from pilotfish.evaluation.protocols.folders import ImageFolder, sample_images
from pilotfish.evaluation.protocols.methods import (
    CFG,
    NONE,
    Method,
    default_guidance_scale,
    scheduler_facts,
    use_protocol_scheduler,
)
from pilotfish.evaluation.protocols.results import (
    ComplianceResult,
    ComplianceRow,
    Gain,
    ProtocolResult,
    ProtocolRow,
    ProtocolRun,
)
from pilotfish.evaluation.protocols.scores import Cosines, Scorers
from pilotfish.evaluation.results import (
    GuideSize,
    Interval,
    PartialResults,
    machine,
    modules,
    versions,
)
from pilotfish.evaluation.run import dtype_name
from pilotfish.guides import Guide
from pilotfish.pipelines.attach import check
from pilotfish.teacher import checksum

Rows = dict[str, dict[str, ImageFolder]]
"""The images by model and method."""
NO_INTERVAL = Interval(math.nan, math.nan)


@dataclass(frozen=True)
class ProtocolSettings:
    """How the images are sampled.

    Attributes:
        protocol: its name.
        cases: prompts of the protocol.
        samples: images of each method; fewer than prompts are spread evenly over them, with more
            the prompts are repeated, each time with a new seed. None: as many as the protocol has.
        seed: of the first image; the others follow.
        guidance_scale: w; None: that of the protocol for the first model.
        batch_size: of each process.

    Raises:
        ValueError: fewer than two samples, no step, or w of at most 1.
    """

    protocol: ProtocolName
    cases: Sequence[Case]
    samples: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    num_inference_steps: int = 20
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.guidance_scale is not None and not self.guidance_scale > 1:
            raise ValueError(
                f"CFG gains nothing at w = {self.guidance_scale:g}; use a larger --guidance_scale"
            )
        if self.count < 2:
            raise ValueError(f"at least two samples are needed, not {self.count}")
        if self.num_inference_steps < 1:
            raise ValueError(f"at least one step is needed, not {self.num_inference_steps}")
        total_batch_size(self.batch_size)

    @property
    def count(self) -> int:
        """Images of each method."""
        if self.samples is not None:
            return self.samples
        return len(self.cases) * PROTOCOLS[self.protocol].images_per_prompt

    @property
    def spread(self) -> tuple[list[Case], list[int]]:
        """Case and seed of each image."""
        return spread_prompts(self.cases, self.count, self.seed)


def run_protocol(
    settings: ProtocolSettings, models: Mapping[str, ModelSource], guides: Mapping[str, Guide],
    rows: Sequence[Method], scorers: Scorers, folder: Path, *, command: str,
    progress: Progress | None = None, log: Callable[[str], None] = print,
) -> ProtocolResult | ComplianceResult:  # fmt: skip
    """Sample and score what is missing in a folder.

    Args:
        models: by name, the base first.
        guides: by name.
        rows: see :func:`~pilotfish.evaluation.protocols.methods.methods`.
        folder: for images and scores.
        command: the command line that repeats the run.
        log: is given a line on every row that is left out.

    Raises:
        ValueError: no model; images of other settings in the folder.
        GuideError: a guide does not fit a model.
    """
    if not models:
        raise ValueError("there is no model to measure")
    protocol = PROTOCOLS[settings.protocol]
    if protocol.has_negatives:
        rows = [m for row in rows if row is not NONE for m in (row, with_negative(row))]
    cases, _ = settings.spread
    sampling = Sampling(settings, guides, folder, progress or (lambda what, done, total: None), log)
    images = {name: sampling.sample(name, source, rows) for name, source in models.items()}
    parts = PartialResults(folder / "scores.json")
    run = ProtocolRun(
        command, settings.protocol, prompts=fingerprint([repr(case) for case in settings.cases]),
        reference_images=len(scorers.fid.files) if scorers.fid else 0, seed=settings.seed,
        samples=len(cases), guidance_scale=sampling.scale or math.nan,
        num_inference_steps=settings.num_inference_steps, schedulers=sampling.schedulers,
        dtype=sampling.dtype, clip=_short(scorers.clip), pickscore=_short(scorers.pickscore),
        machine=machine(), versions=versions(),
    )  # fmt: skip
    places = {case: i for i, case in enumerate(dict.fromkeys(cases))}
    scoring = Scoring(scorers, parts, torch.tensor([places[case] for case in cases]), progress)
    titles = {row.name: row.title for row in rows}
    if protocol.has_negatives:
        return ComplianceResult(
            {name: scoring.compliance(name, found, titles) for name, found in images.items()},
            sampling.sizes, run,
        )  # fmt: skip
    return ProtocolResult(
        {name: scoring.gains(name, found, titles) for name, found in images.items()},
        sampling.sizes, run,
    )  # fmt: skip


def with_negative(method: Method) -> Method:
    """The same method with the negative prompts."""
    return replace(method, name=f"{method.name}-negative", with_negative=True)


class Sampling:
    """The images of all models, each loaded once."""

    def __init__(
        self, settings: ProtocolSettings, guides: Mapping[str, Guide], folder: Path,
        progress: Progress, log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.settings, self.guides, self.folder = settings, guides, folder
        self.progress, self.log = progress, log
        self.weights = {name: checksum(guide) for name, guide in guides.items()}
        self.scale = settings.guidance_scale
        self.sizes: dict[str, GuideSize] = {}
        self.schedulers: dict[str, str] = {}
        self.dtype = ""

    def sample(self, name: str, source: ModelSource, rows: Sequence[Method]) -> Any:
        """The images of one model by method."""
        settings, pipe = self.settings, source.load()
        for guide in self.guides.values():
            check(guide, pipe)
        use_protocol_scheduler(pipe)
        self.scale = self.scale or default_guidance_scale(pipe)
        self.sizes = self.sizes or {k: GuideSize.of(g, pipe, k) for k, g in self.guides.items()}
        self.schedulers[name], self.dtype = type(pipe.scheduler).__name__, dtype_name(pipe)
        cases, seeds = settings.spread
        networks = sorted((k, checksum(module)) for k, module in modules(pipe).items())
        facts = {
            "model": _digest(networks), "scheduler": scheduler_facts(pipe), "dtype": self.dtype,
            "num_inference_steps": str(settings.num_inference_steps),
            "prompts or seeds": _digest([cases, seeds]),
            "batch_size": str(total_batch_size(settings.batch_size)),
        }  # fmt: skip
        found: dict[str, ImageFolder] = {}
        for row in rows:
            if not row.fits(pipe):
                self.log(f"{name}: {row.title} needs a UNet and is left out")
                continue
            own = facts | {
                "method": row.name, "guide": self.weights.get(row.guide, "none"),
                "guidance_scale": f"{self.scale if row.guided else 1.0:g}",
            }  # fmt: skip
            images = ImageFolder(
                self.folder / "images" / name / row.name, own, cases,
                total_batch_size(settings.batch_size),
            )  # fmt: skip
            sample_images(
                pipe, row, images, seeds, guidance_scale=self.scale,
                num_inference_steps=settings.num_inference_steps,
                progress=self.progress, title=f"{name}: {row.name}",
            )  # fmt: skip
            found[row.name] = images
        return found


class Scoring:
    """The rows of each model.

    Args:
        parts: where scores are kept.
        prompt: (N,) index of each image's prompt.
    """

    def __init__(
        self, scorers: Scorers, parts: PartialResults, prompt: torch.Tensor,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self.scorers, self.parts, self.prompt, self.progress = scorers, parts, prompt, progress

    def gains(
        self, model: str, images: Mapping[str, ImageFolder], titles: Mapping[str, str]
    ) -> dict[str, ProtocolRow]:
        """The scores of every method and the share of CFG's gain that it keeps."""
        scored: dict[str, dict[str, torch.Tensor]] = {"clip": {}, "pickscore": {}}
        distances: dict[str, float] = {}
        for method, found in images.items():
            report = named_progress(self.progress, f"{model}: {method}")
            prompts = [case.prompt for case in found.cases]
            for name, by_method in scored.items():
                values = self.scorers.cosines(name, found, prompts, self.parts, report)
                if values is not None:
                    by_method[method] = values
            distances[method] = self.scorers.distance(found, self.parts, report)
        rows = {}
        for method, found in images.items():
            scores = {
                {"clip": "clip_score"}.get(name, name): self._gain(by_method, method)
                for name, by_method in scored.items()
                if by_method
            }
            rows[method] = ProtocolRow(titles[method], found.passes, scores, distances[method])
        return rows

    def _gain(self, scores: Mapping[str, torch.Tensor], method: str) -> Gain:
        none, cfg, own = (scores[name] for name in (NONE.name, CFG.name, method))
        if method in (NONE.name, CFG.name):
            return Gain(float(own.mean()), math.nan, NO_INTERVAL)
        kept = gain_kept(*(float(x.mean()) for x in (none, cfg, own)))
        return Gain(float(own.mean()), kept, self._interval(none, cfg, own))

    def _interval(self, none: torch.Tensor, cfg: torch.Tensor, own: torch.Tensor) -> Interval:
        return gain_kept_interval(
            none.float(), cfg.float(), own.float(), prompt=self.prompt
        )  # fmt: skip

    def compliance(
        self, model: str, images: Mapping[str, ImageFolder], titles: Mapping[str, str]
    ) -> dict[str, ComplianceRow]:
        """How far each method follows the negative prompts, and what share of CFG's it is."""
        if self.scorers.clip is None:
            raise ValueError("the test of negative prompts needs the metric clip_score")
        similar: dict[str, torch.Tensor] = {}
        prompt: dict[str, torch.Tensor] = {}
        for method, found in images.items():
            report = named_progress(self.progress, f"{model}: {method}")
            for into, texts in (
                (similar, [case.negative_prompt for case in found.cases]),
                (prompt, [case.prompt for case in found.cases]),
            ):
                values = self.scorers.cosines("clip", found, texts, self.parts, report)
                assert values is not None
                into[method] = values
        methods = [name for name in images if f"{name}-negative" in images]
        less = {name: similar[name] - similar[f"{name}-negative"] for name in methods}
        rows = {}
        for name in methods:
            negative, none = f"{name}-negative", torch.zeros_like(less[name])
            kept, interval = math.nan, NO_INTERVAL
            if name != CFG.name:
                kept = gain_kept(0.0, float(less[CFG.name].mean()), float(less[name].mean()))
                interval = self._interval(none, less[CFG.name], less[name])
            rows[name] = ComplianceRow(
                titles[name], images[negative].passes, float(similar[name].mean()),
                float(similar[negative].mean()), float(less[name].mean()), kept, interval,
                float(prompt[negative].mean()),
            )  # fmt: skip
        return rows


def _digest(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()


def _short(scorer: Cosines | None) -> str:
    return scorer.checksum[:16] if scorer else ""
