"""``pilotfish demo``: distil a short guide on the bundled model, and write a page about it."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jinja2 import Environment, StrictUndefined
from tqdm import tqdm

from pilotfish import bundled
from pilotfish.evaluation.results import Cost, Result
from pilotfish.evaluation.speed import measure_cost
from pilotfish.evaluation.tables import LEGEND, kept, number, percent
from pilotfish.guidance import GuidanceMode
from pilotfish.guides import Guide
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.sampling import Attachable, sample
from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import distill

TEMPLATE = Path(__file__).with_name("demo.html.j2")
RECORDED = Path(__file__).parents[3] / "results" / "guide.json"
"""The figures of the guide of version 0.1, in a clone."""
TRAINING = "demo-training"
"""Folder of the distillation in ``--output``. A new demo deletes it, so no other command may use
it."""
EVERY = 12
"""A short run sees few prompts, so only one in so many is encoded."""
BATCH = 8


@dataclass(frozen=True)
class DemoConfig:
    """Distil a short guide for the bundled base, attach it to the base and its three fine-tunes,
    and write a page that shows it beside the bundled guides."""

    max_train_steps: int = 60
    """Optimizer steps of the short guide."""
    guidance_scale: float = 4.0
    num_inference_steps: int = 25
    refresh: int | None = None
    """How many steps of both guides run both passes. Left out: the bundled guide's ratio."""
    rounds: int = 5
    """Rounds of the side-by-side timing."""
    seed: int = 0
    resume_from_checkpoint: str | None = None
    """``latest``: continue a distillation that was interrupted."""
    output: str = "runs/demo"
    """Folder of the page and the guide."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(DemoConfig, args=list(arguments), prog="pilotfish demo", use_underscores=True)
    folder = Path(config.output)
    training = folder / TRAINING
    if config.resume_from_checkpoint is None and training.exists():
        shutil.rmtree(training)
    short, images = distill_short(config, training), {}
    bases = [base for base in bundled.BASES if bundled.guide_names(base)]
    own = {base: bundled.load_guide(bundled.guide_of(base)) for base in bases}
    ratios = {
        base: guide.refresh_ratio if config.refresh is None else config.refresh
        for base, guide in own.items()
    }
    models = {name: base for base in bases for name in bundled.BASES[base]}
    for name, base in tqdm(models.items(), desc="images of each model"):
        guides = {"bundled guide": Refreshed(own[base], ratios[base])}
        if base == "base":
            guides["short guide"] = Refreshed(short, ratios[base])
        images[name] = draw(bundled.load_model(name), guides, config)
    print("timing CFG and the bundled guides")
    costs = {
        base: measure_cost(
            bundled.load_model(base), guide, guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps, batch_sizes=(BATCH,),
            rounds=config.rounds, refresh=ratios[base],
        )
        for base, guide in own.items()
    }  # fmt: skip
    history = json.loads((training / "history.json").read_text(encoding="utf-8"))
    error = number(history[-1]["guidance_error"])
    speed = {base: number(cost.cfg_over_guided[str(BATCH)]) for base, cost in costs.items()}
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    path = folder / "report.html"
    path.write_text(
        page.render(
            config=config, prompts=bundled.GRID_PROMPTS, images=images, speed=speed, error=error,
            batch=BATCH, costs=[cost_row(base, cost) for base, cost in costs.items()],
            recorded=recorded_table(), legend=LEGEND.replace("*", ""),
            guide=training / "guide",
        ),
        encoding="utf-8",
    )  # fmt: skip
    print(
        f"guidance error of the short guide: {error} (0 is CFG, 1 is no guide)\n"
        f"speed at batch {BATCH}, relative to CFG: "
        f"{', '.join(f'{ratio} on {base}' for base, ratio in speed.items())}\n"
        f"open {path}"
    )


def distill_short(config: DemoConfig, folder: Path) -> Guide:
    """A guide from about a minute of training."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("\n".join(bundled.prompts("training")[::EVERY]) + "\n", encoding="utf-8")
    return distill(
        DistillConfig(
            output=str(folder), prompts=str(prompts),
            validation_prompts=str(bundled.FOLDER / "prompts" / "held_out.txt"),
            max_train_steps=config.max_train_steps, seed=config.seed,
            resume_from_checkpoint=config.resume_from_checkpoint,
            # few samples, so small pools: the latents must leave the noise
            train_batch_size=32, pool=64, replay_capacity=2048, lr_warmup_steps=10,
            checkpointing_steps=20, validation_steps=config.max_train_steps, report_to="none",
        )
    )  # fmt: skip


def draw(
    pipe: Any, guides: Mapping[str, Attachable], config: DemoConfig
) -> dict[str, list[str]]:  # fmt: skip
    """Images of the grid prompts without guidance, with CFG and with each guide, as data URIs."""
    prompts, columns = bundled.GRID_PROMPTS, {}
    ways: dict[str, tuple[float, Attachable | None]] = {
        "no guidance": (1.0, None), "CFG": (config.guidance_scale, None),
        **{name: (config.guidance_scale, guide) for name, guide in guides.items()},
    }  # fmt: skip
    for name, (w, guide) in ways.items():
        samples = sample(
            pipe, prompts, seeds=range(config.seed, config.seed + len(prompts)), guidance_scale=w,
            num_inference_steps=config.num_inference_steps, guide=guide, batch_size=len(prompts),
        )  # fmt: skip
        pixels = torch.stack([s.image for s in samples])
        images = pipe.image_processor.postprocess(pixels, output_type="pil")
        columns[name] = [data_uri(image) for image in images]
    return columns


def cost_row(base: str, cost: Cost) -> list[str]:
    """The base's name; passes and seconds in every guidance mode."""
    cells = [
        (f"{cost.passes[mode]:g}", number(cost.seconds[str(BATCH)][mode])) for mode in GuidanceMode
    ]
    return [base, *(cell for pair in cells for cell in pair)]


def data_uri(image: Any) -> str:
    """An image as the address of an ``img`` element."""
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def recorded_table() -> dict[str, Any] | None:
    """The recorded figures of an earlier guide, with the command that measured them; None
    outside a clone."""
    if not RECORDED.is_file():
        return None
    result = Result.load(RECORDED)
    rows = [
        [
            name,
            *(percent(model.scores[mode].top1) for mode in GuidanceMode),
            kept(model),
            number(model.guidance_error.mean),
        ]
        for name, model in result.models.items()
    ]
    return {
        "headings": [
            "model", "top-1, no guidance", "top-1, CFG", "top-1, guided", "CFG gain kept",
            "guidance error",
        ],
        "rows": rows, "run": result.run, "guide": result.guide,
    }  # fmt: skip
