"""Stage ``ablations``: forms of the guide and ways of training it, on equal training.

The models do not need it. It writes ``results/ablations.json`` and prints a table.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pilotfish import bundled
from pilotfish.evaluation.results import machine, versions
from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import distill
from recipe.finetunes import TRAIN_FINETUNES
from recipe.vocabulary import captions

NOTHING = {"text": False, "attention": False, "modulation": False, "rank": 0, "head": 0}
ABLATIONS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "external": {"guide_type": "external"},
    "full": {"guide_type": "full"},
    "tiny-text": {"guide": {**NOTHING, "text": True}},
    "tiny-attention": {"guide": {**NOTHING, "attention": True}},
    "tiny-modulation": {"guide": {**NOTHING, "modulation": True}},
    "tiny-extrapolation": {"guide": {"rank": 0, "head": 0}},
    "tiny-layers-head": {"guide": {"text": False, "attention": False, "modulation": False}},
    # by default: new samples at every step, from CFG trajectories, on the base alone
    "tiny-noised": {"training_samples": "noised"},
    "tiny-on-policy": {"training_samples": "on_policy"},
    "tiny-reuse-4": {"replay_reuse": 4},
    "tiny-pool-64": {"pool": 64},
    "tiny-prompts-429": {"prompts": "captions"},
    "tiny-negatives": {"negative_prompt_prob": 0.25},
    "tiny-finetunes": {"train_finetunes": tuple(TRAIN_FINETUNES)},
    # last, so that an interrupted run has the others
    "tiny-layers": {"guide": {**NOTHING, "rank": 28}},
    "tiny-head": {"guide": {**NOTHING, "head": 48}},
    "tiny-no-text": {"guide": {"text": False}},
    "tiny-no-attention": {"guide": {"attention": False}},
    "tiny-no-modulation": {"guide": {"modulation": False}},
}


@dataclass(frozen=True)
class AblationsStage:
    """What is compared, and how long each is trained."""

    names: tuple[str, ...] = tuple(ABLATIONS)
    steps: int = 100
    batch: int = 64
    prompts: int = 24
    num_inference_steps: int = 12
    seed: int = 0
    output: Path = Path("results/ablations.json")


def run_ablations(work: Path, stage: AblationsStage, *, bf16: bool) -> None:
    """Train each, measure its guidance error on every model, write JSON, print the table."""
    run = {k: v for k, v in asdict(stage).items() if k not in ("names", "output")}
    run |= {"command": "python -m recipe ablations", "machine": machine(), "versions": versions()}
    rows: dict[str, Any] = {}
    held_out = bundled.prompts("held_out")[: stage.prompts]
    for name in stage.names:
        folder = work / "ablations" / name
        settings = dict(ABLATIONS[name])
        if "prompts" in settings:
            folder.mkdir(parents=True, exist_ok=True)
            settings["prompts"] = str(folder / "captions.txt")
            Path(settings["prompts"]).write_text("\n".join(captions()) + "\n")
        guide = distill(
            DistillConfig(
                output=str(folder), max_train_steps=stage.steps, seed=stage.seed,
                train_batch_size=stage.batch, validation_steps=stage.steps, report_to="none",
                resume_from_checkpoint="latest", mixed_precision="bf16" if bf16 else "no",
                lr_warmup_steps=30, replay_capacity=2048, **settings,
            )
        )  # fmt: skip
        rows[name] = measure(guide, held_out, stage, bf16=bf16)
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        stage.output.write_text(json.dumps({"ablations": rows, "run": run}, indent=2) + "\n")
    print(table(rows))


def measure(
    guide: Guide, held_out: list[str], stage: AblationsStage, *, bf16: bool
) -> dict[str, Any]:
    """Size and guidance error on every bundled model."""
    errors, share = {}, 0.0
    parameters = sum(p.numel() for p in guide.parameters())
    for name in bundled.MODELS:
        pipe: Any = bundled.load_model(name)
        if name == "base":
            share = parameters / sum(p.numel() for p in pipe.unet.parameters())
        # as in training
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
            trajectories = Trajectories.of_pipeline(
                pipe, held_out, seed=stage.seed, num_inference_steps=stage.num_inference_steps
            )
            error = pipeline_guidance_error(pipe, guide, trajectories)
        errors[name] = {"mean": error.mean, "by_w": error.by_w}
    return {"parameters": parameters, "share": share, "guidance_error": errors}


def table(rows: dict[str, Any]) -> str:
    """In Markdown: size, and guidance error by model."""
    models = list(next(iter(rows.values()))["guidance_error"])
    lines = [
        f"| guide | parameters | {' | '.join(models)} |",
        "|---|---:|" + "---:|" * len(models),
    ]
    for name, row in rows.items():
        errors = " | ".join(f"{row['guidance_error'][model]['mean']:.3f}" for model in models)
        lines.append(f"| {name} | {100 * row['share']:.2f} % | {errors} |")
    return "\n".join(lines)
