"""``pilotfish evaluate --protocol``: a public benchmark on the user's own weights."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from pilotfish.cli import own_baselines
from pilotfish.cli.names import Dtype, model_sources, open_guide, split_name
from pilotfish.cli.progress import progress_bars
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.processes import device, is_main
from pilotfish.evaluation.protocols.definitions import (
    PROTOCOLS,
    Metric,
    ProtocolName,
    load_cases,
)
from pilotfish.evaluation.protocols.inputs import Inputs, check_inputs
from pilotfish.evaluation.protocols.methods import methods
from pilotfish.evaluation.protocols.report import protocol_markdown, protocol_table
from pilotfish.evaluation.protocols.run import ProtocolSettings, run_protocol
from pilotfish.evaluation.protocols.scores import (
    Cosines,
    ReferenceFID,
    Scorers,
    pickscore_factor,
)
from pilotfish.guides import Guide


@dataclass(frozen=True)
class ProtocolConfig:
    """Measure guides by a public protocol: images of its prompts without guidance, with CFG, with
    the guides and with delta reuse, scored by models that are given as local folders. Nothing is
    downloaded: what is missing is named, and where it comes from. The images stay in the output
    folder; the same command resumes there."""

    protocol: ProtocolName
    """coco2017: CLIP score, FID and PickScore on captions of COCO. drawbench, parti: CLIP score and
    PickScore. negative-prompts: how far the images avoid a negative prompt."""
    models: tuple[str, ...] = ()
    """Pipelines, the base first, then its fine-tunes: folders, bundled models, or hub ids that are
    in the cache."""
    guide: tuple[str, ...] = ()
    """Guides of the base: folders, bundled ones, or hub ids in the cache. NAME=GUIDE gives one a
    name."""
    prompts: str | None = None
    """File of prompts: captions_val2017.json, a JSON object of captions by image, a CSV or TSV, or
    a text file. negative-prompts: a table with the columns prompt and negative_prompt; left out, a
    built-in list of 16 pairs."""
    reference_images: str | None = None
    """Folder of real images, for FID."""
    inception_weights: str | None = None
    """File of torch-fidelity's Inception weights, for FID."""
    clip: str | None = None
    """Folder of a CLIP, for CLIP score and negative prompts."""
    pickscore: str | None = None
    """Folder of PickScore, which is a CLIP in transformers' format."""
    metrics: tuple[Metric, ...] = ()
    """Left out: those of the protocol."""
    refresh: tuple[int, ...] = (0, 3)
    """Steps of the guides that run both passes; a row for each number."""
    delta_reuse: tuple[int, ...] | None = None
    """Second passes of delta reuse, which is in a clone; a row for each number. Left out: those of
    --refresh above 0."""
    samples: int | None = None
    """Images of each row. Left out: one for each prompt; of negative-prompts 16 for each."""
    seed: int = 0
    guidance_scale: float | None = None
    """Left out: 7.5 for Stable Diffusion 1.x and 2.x, 5 for XL, 4.5 for 3.x."""
    num_inference_steps: int = 20
    """Of DPM-Solver++, or of the own scheduler of flow models."""
    batch_size: int = 8
    """Images in one call, in each process."""
    dtype: Dtype = "float32"
    """Precision of the models."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, of models that come in no other."""
    output: str | None = None
    """Folder for images, scores.json, result.json and result.md. Left out: runs/PROTOCOL."""


def main(arguments: Sequence[str]) -> None:
    """Run ``pilotfish evaluate --protocol``."""
    config = tyro.cli(
        ProtocolConfig, args=list(arguments), prog="pilotfish evaluate", use_underscores=True
    )
    protocol = PROTOCOLS[config.protocol]
    metrics = config.metrics or protocol.metrics
    if protocol.has_negatives and metrics != ("clip_score",):
        raise ValueError("negative-prompts has the metric clip_score alone")
    named = [split_name(text) for text in config.guide]
    check_inputs(
        Inputs(
            config.models, [path for _, path in named], config.prompts, config.reference_images,
            config.inception_weights, config.clip, config.pickscore,
        ),
        protocol, metrics,
    )  # fmt: skip
    cases = load_cases(protocol, config.prompts)
    settings = ProtocolSettings(
        config.protocol, cases, config.samples, config.seed, config.guidance_scale,
        config.num_inference_steps, config.batch_size,
    )  # fmt: skip
    guides = {name: open_guide(path) for name, path in named}
    if len(guides) < len(named):
        raise ValueError("two guides have one name; give one of them another: NAME=GUIDE")
    folder = Path(config.output or f"runs/{config.protocol}")
    scorers = open_scorers(config, metrics)
    with progress_bars() as progress:
        found = run_protocol(
            settings, model_sources(config.models, (), config.dtype, config.variant), guides,
            rows(config, guides), scorers, folder, progress=progress,
            command=shlex.join(["pilotfish", "evaluate", *arguments]),
            log=print if is_main() else lambda line: None,
        )  # fmt: skip
    if is_main():
        found.save(folder / "result.json")
        page = protocol_markdown(found)
        (folder / "result.md").write_text(page, encoding="utf-8", newline="\n")
        Console(width=120).print(protocol_table(found))
        print(f"saved {folder / 'result.json'} and {folder / 'result.md'}")


def rows(config: ProtocolConfig, guides: dict[str, Guide]) -> Any:
    """The methods that are measured."""
    baselines = own_baselines()
    if baselines is None and config.delta_reuse:
        raise ValueError("--delta_reuse is in the package baselines of a clone")
    if baselines is None and config.delta_reuse is None and is_main():
        print("delta reuse is in the package baselines of a clone and is left out")
    counts = config.delta_reuse
    if counts is None:
        counts = tuple(k for k in config.refresh if k)
    return methods(
        guides, config.refresh, counts, baselines.DeltaReuse if baselines else None,
        config.num_inference_steps,
    )  # fmt: skip


def open_scorers(config: ProtocolConfig, metrics: Sequence[Metric]) -> Scorers:
    """The models that score, before anything is sampled.

    Raises:
        ValueError: one of them cannot be read.
    """
    clip = pickscore = fid = None
    if "clip_score" in metrics:
        clip = Cosines(Scorer.from_folder(str(config.clip)), 100.0, device())
    if "pickscore" in metrics:
        scorer = Scorer.from_folder(str(config.pickscore))
        pickscore = Cosines(scorer, pickscore_factor(scorer), device())
    if "fid" in metrics:
        fid = ReferenceFID(str(config.inception_weights), str(config.reference_images), device())
    return Scorers(clip, pickscore, fid)
