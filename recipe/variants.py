"""``variants``: forms of the tiny guide and ways of training it, on equal training.

Not needed to make the model; it writes ``results/variants.json`` and prints a table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pilotfish import bundled
from pilotfish.evaluation.hosts import embedded_hosts
from pilotfish.evaluation.machine import machine, versions
from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import distill
from recipe.finetunes import PRACTICE

NOTHING = {"push": False, "attention": False, "embedding": False, "rank": 0, "head": 0}
FORMS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "external-latents": {"guide": "external", "reads": ("latents",)},
    "external-skips": {"guide": "external", "reads": ("skips",)},
    "full": {"guide": "full"},
    "tiny-text": {**NOTHING, "push": True},
    "tiny-attention": {**NOTHING, "attention": True},
    "tiny-embedding": {**NOTHING, "embedding": True},
    "tiny-pushes": {"rank": 0, "head": 0},
    "tiny-layers-head": {**NOTHING, "rank": 28, "head": 48},
}
TRAINING: dict[str, dict[str, Any]] = {
    # "tiny" itself is trained on new states at every step, from trajectories, on the base alone
    "tiny-states-noised": {"states": "noised"},
    "tiny-states-student": {"states": "student"},
    "tiny-reuse-4": {"replay_reuse": 4},
    "tiny-pool-64": {"pool": 64},
    "tiny-prompts-429": {"prompts": str(bundled.FOLDER / "prompts" / "captions.txt")},
    "tiny-negatives": {"negative_share": 0.25},
    "tiny-practice": {"practice": True},
}
# further forms, last, so that a run which is cut off has the others
FURTHER: dict[str, dict[str, Any]] = {
    "external-both": {"guide": "external", "reads": ("latents", "skips")},
    "tiny-layers": {**NOTHING, "rank": 28},
    "tiny-head": {**NOTHING, "head": 48},
    "tiny-no-text": {"push": False},
    "tiny-no-attention": {"attention": False},
    "tiny-no-embedding": {"embedding": False},
}


@dataclass(frozen=True)
class VariantsStage:
    """What is compared, and how long each is trained."""

    names: tuple[str, ...] = (*FORMS, *TRAINING, *FURTHER)
    steps: int = 100
    batch: int = 64
    prompts: int = 24
    num_inference_steps: int = 12
    seed: int = 0
    output: Path = Path("results/variants.json")


def compare_variants(work: Path, stage: VariantsStage) -> None:
    """Train each, measure its guidance error on every host, write JSON, print the table."""
    run = {k: v for k, v in asdict(stage).items() if k not in ("names", "output")}
    rows = measured(stage.output, run)
    held_out = bundled.prompts("held_out")[: stage.prompts]
    for name in stage.names:
        if name in rows:
            continue
        settings = {"states": "trajectory", **(FORMS | TRAINING | FURTHER)[name]}
        if settings.get("practice"):
            settings["practice"] = tuple(PRACTICE)
        folder = work / "variants" / name
        guide = distill(
            DistillConfig(
                output_dir=str(folder), max_train_steps=stage.steps, seed=stage.seed,
                train_batch_size=stage.batch, validation_steps=stage.steps, report_to="none",
                resume="latest", mixed_precision="bf16", lr_warmup_steps=30,
                replay_capacity=2048, **settings,
            )
        )  # fmt: skip
        rows[name] = measure(guide, held_out, stage)
        how = {"command": "python -m recipe variants", "machine": machine(), "versions": versions()}
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        stage.output.write_text(json.dumps({"variants": rows, "run": run | how}, indent=2) + "\n")
    hosts = list(bundled.MODELS)
    print("| variant | parameters |", " | ".join(hosts), "|")
    print("|---|---:|" + "---:|" * len(hosts))
    for name, row in rows.items():
        errors = " | ".join(f"{row['guidance_error'][host]['mean']:.3f}" for host in hosts)
        print(f"| {name} | {100 * row['share']:.2f} % | {errors} |")


def measured(output: Path, run: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run to go on from, if there are any.

    Raises:
        ValueError: they are of other settings, and one table cannot hold both.
    """
    if not output.is_file():
        return {}
    found: dict[str, Any] = json.loads(output.read_text())
    differs = [k for k, v in run.items() if found["run"].get(k) != v]
    if differs:
        raise ValueError(f"{output} was made with another {differs[0]}; move it away to begin anew")
    rows: dict[str, Any] = found["variants"]
    return rows


def measure(guide: Guide, held_out: list[str], stage: VariantsStage) -> dict[str, Any]:
    """Size and guidance error on every embedded host."""
    errors, share = {}, 0.0
    parameters = sum(p.numel() for p in guide.parameters())
    for host, found in embedded_hosts().items():
        pipe = found.load()
        if host == "base":
            share = parameters / sum(p.numel() for p in pipe.unet.parameters())
        with torch.autocast(pipe.device.type, torch.bfloat16):  # as they were trained
            trajectories = Trajectories.of_pipeline(
                pipe, held_out, seed=stage.seed, num_inference_steps=stage.num_inference_steps
            )
            error = pipeline_guidance_error(pipe, guide, trajectories)
        errors[host] = {"mean": error.mean, "by_w": error.by_w}
    return {"parameters": parameters, "share": share, "guidance_error": errors}
