"""A protocol from its prompts to its result: first all images, then all scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch

from pilotfish.data.prompts import fingerprint
from pilotfish.evaluation.images import ModelSource, Progress, spread_prompts
from pilotfish.evaluation.processes import total_batch_size
from pilotfish.evaluation.protocols.definitions import PROTOCOLS, Case, ProtocolName
from pilotfish.evaluation.protocols.folders import ImageFolder, sample_images
from pilotfish.evaluation.protocols.methods import (
    NONE,
    Method,
    default_guidance_scale,
    scheduler_facts,
    use_protocol_scheduler,
)
from pilotfish.evaluation.protocols.results import (
    ComplianceResult,
    ProtocolResult,
    ProtocolRun,
)
from pilotfish.evaluation.protocols.scores import Cosines, Scorers
from pilotfish.evaluation.protocols.shares import Shares, negative_name
from pilotfish.evaluation.results import GuideSize, PartialResults, machine, modules, versions
from pilotfish.evaluation.run import dtype_name
from pilotfish.guides import Guide
from pilotfish.pipelines.attach import check
from pilotfish.teacher import checksum


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
    report: Progress = progress or (lambda what, done, total: None)
    cases, _ = settings.spread
    sampling = Sampling(settings, guides, folder, report, log)
    images = {name: sampling.sample(name, source, rows) for name, source in models.items()}
    parts = PartialResults(folder / "scores.json")
    run = ProtocolRun(
        command, settings.protocol, prompts=fingerprint([repr(case) for case in settings.cases]),
        reference_images=len(scorers.fid.files) if scorers.fid else 0, seed=settings.seed,
        samples=len(cases), guidance_scale=sampling.scale or math.nan,
        num_inference_steps=settings.num_inference_steps, schedulers=sampling.schedulers,
        dtype=sampling.dtype, clip=_short(scorers.clip_score), pickscore=_short(scorers.pickscore),
        machine=machine(), versions=versions(),
    )  # fmt: skip
    places = {case: i for i, case in enumerate(dict.fromkeys(cases))}
    prompt = torch.tensor([places[case] for case in cases])
    shares = Shares(scorers, parts, prompt, {row.name: row.title for row in rows}, report)
    if protocol.has_negatives:
        return ComplianceResult(
            {name: shares.compliance(name, found) for name, found in images.items()},
            sampling.sizes, run,
        )  # fmt: skip
    return ProtocolResult(
        {name: shares.gains(name, found) for name, found in images.items()}, sampling.sizes, run
    )


def with_negative(method: Method) -> Method:
    """The same method with the negative prompts."""
    return replace(method, name=negative_name(method.name), with_negative=True)


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

    def sample(
        self, name: str, source: ModelSource, rows: Sequence[Method]
    ) -> dict[str, ImageFolder]:
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
            if refusal := row.refusal(pipe):
                self.log(f"{name}: {row.title} is left out: {refusal}")
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


def _digest(value: object) -> str:
    return sha256(repr(value).encode()).hexdigest()


def _short(scorer: Cosines | None) -> str:
    return scorer.checksum[:16] if scorer else ""
