"""Stage ``quantization``: guides trained on a base in fewer bits, on equal training.

The models do not need it. It writes ``results/quantization.json``, whose table is in
docs/train.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from pilotfish import bundled
from pilotfish.evaluation.results import Saved, machine, versions
from pilotfish.evaluation.tables import markdown, number
from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig
from pilotfish.training.fields import Quantization
from pilotfish.training.quantization import quantize
from pilotfish.training.stages import distill

KINDS = ("no", "fp8", "int8", "nf4", "int8-torchao")


@dataclass(frozen=True)
class QuantizationStage:
    """What is compared, and how long each guide is trained."""

    kinds: tuple[str, ...] = KINDS
    """Values of ``distill --base_quantization``, ``no`` first."""
    steps: int = 200
    batch: int = 64
    prompts: int = 24
    """Held-out prompts of the guidance error."""
    num_inference_steps: int = 12
    seed: int = 0
    output: Path = Path("results/quantization.json")


@dataclass(frozen=True)
class QuantizedBase:
    """The mean guidance errors of guides that begin and are trained alike.

    Attributes:
        trained_on_it: of the guide that was trained on this base, on this base.
        on_plain: of the same guide on the plain base.
        plain_on_it: of the guide that was trained on the plain base, on this base.
    """

    trained_on_it: float
    on_plain: float
    plain_on_it: float


@dataclass(frozen=True)
class QuantizationRun:
    """How it was measured."""

    command: str
    machine: str
    versions: dict[str, str]
    steps: int
    batch: int
    prompts: int
    num_inference_steps: int
    seed: int


@dataclass(frozen=True)
class QuantizationResult(Saved):
    """By kind of quantisation; ``no`` is the plain base."""

    run: QuantizationRun
    bases: dict[str, QuantizedBase] = field(default_factory=dict)


def measure_quantization(work: Path, stage: QuantizationStage, *, bf16: bool) -> None:
    """Train a guide on the base in each kind, measure, write JSON, print the table.

    Raises:
        ConfigError: the package of a kind is missing.
    """
    folders = {kind: work / "quantization" / kind for kind in stage.kinds}
    guides = {kind: _distil(folders[kind], kind, stage, bf16=bf16) for kind in stage.kinds}
    plain = stage.kinds[0]
    on_plain = _errors([*guides.values()], plain, stage, bf16=bf16)
    bases: dict[str, QuantizedBase] = {}
    for kind, there in zip(stage.kinds, on_plain, strict=True):
        own, of_plain = _errors([guides[kind], guides[plain]], kind, stage, bf16=bf16)
        bases[kind] = QuantizedBase(own, there, of_plain)
    some = "" if stage.kinds == KINDS else f" --quantization.kinds {' '.join(stage.kinds)}"
    run = QuantizationRun(
        f"python -m recipe quantization{some}", machine(), versions(), stage.steps, stage.batch,
        stage.prompts, stage.num_inference_steps, stage.seed,
    )  # fmt: skip
    found = QuantizationResult(run, bases)
    found.save(stage.output)
    print(quantization_text(found))


def _distil(folder: Path, kind: str, stage: QuantizationStage, *, bf16: bool) -> Guide:
    """A fresh guide after its training; done already where the folder holds it."""
    return distill(
        DistillConfig(
            output=str(folder), base_quantization=cast(Quantization, kind),
            gradient_checkpointing=kind != "no", cache_embeddings=str(folder.parent / "embeddings"),
            max_train_steps=stage.steps, train_batch_size=stage.batch, seed=stage.seed,
            validation_steps=stage.steps, checkpointing_steps=50, report_to="none",
            resume_from_checkpoint="latest", mixed_precision="bf16" if bf16 else "no",
            lr_warmup_steps=30, replay_capacity=2048,
        )
    )  # fmt: skip


def _errors(
    guides: list[Guide], kind: str, stage: QuantizationStage, *, bf16: bool
) -> list[float]:  # fmt: skip
    """The mean guidance error of each guide on the base in a kind."""
    pipe: Any = bundled.load_model("base")
    quantize(pipe.unet, cast(Quantization, kind), torch.float32, pipe.device)
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):  # as in training
        trajectories = Trajectories.of_pipeline(
            pipe, bundled.prompts("held_out")[: stage.prompts], seed=stage.seed,
            num_inference_steps=stage.num_inference_steps, cache=True,
        )  # fmt: skip
        return [pipeline_guidance_error(pipe, guide, trajectories).mean for guide in guides]


def quantization_text(found: QuantizationResult) -> str:
    """A row for each kind, with errors relative to the guide of the plain base there; how it was
    measured."""
    plain, run = next(iter(found.bases.values())).trained_on_it, found.run

    def cell(error: float) -> str:
        return f"{number(error, 4)} ({error / plain - 1:+.1%})"

    rows = [
        (f"`{kind}`", cell(base.trained_on_it), cell(base.on_plain), cell(base.plain_on_it))
        for kind, base in found.bases.items()
    ]
    headings = ("base", "trained on it, on it", "trained on it, on the plain base",
                "trained on the plain base, on it")  # fmt: skip
    return (
        f"{markdown(headings, rows).rstrip()}\n\n"
        "Mean guidance error, and how far it is from that of the guide of the plain base on the "
        f"plain base. Measured by `{run.command}` on {run.machine}, seed {run.seed}: fresh guides "
        f"of the bundled base, {run.steps} steps of {run.batch} samples each; {run.prompts} "
        f"held-out prompts, {run.num_inference_steps} steps. The whole result is in "
        "`results/quantization.json`."
    )
