"""Short trainings on tiny components."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pilotfish.guides import Guide, TinyGuide
from pilotfish.training.config import DistillConfig, StepsConfig, TrainingConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.stages import GuidanceTrainer, StepTrainer, new_guide
from tests.forked import Forked

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]
VALIDATION = ["tca", "act"]
WEIGHTS = "guide/diffusion_pytorch_model.safetensors"
SHORT: dict[str, Any] = {
    "train_batch_size": 4, "max_train_steps": 4, "pool": 8, "replay_capacity": 8,
    "checkpointing_steps": 2, "checkpoints_total_limit": None, "validation_steps": 4,
    "lr_warmup_steps": 1, "report_to": "none",
}  # fmt: skip


def train(config: DistillConfig, context: TrainingContext) -> Guide:
    guide = new_guide(config, context)
    return GuidanceTrainer(config, context, guide, log=lambda line: None).run()


def small_guide(unet: Any, prediction_type: str = "epsilon") -> TinyGuide:
    torch.manual_seed(0)
    return TinyGuide.for_denoiser(unet, prediction_type, rank=4)


def train_steps(
    config: StepsConfig, context: TrainingContext, initial: Guide | None = None, steps: int = 2
) -> Guide:
    initial = initial or small_guide(context.pipe.unet, context.path.prediction_type)
    return StepTrainer(config, context, initial, steps, log=lambda line: None).run()


def same(one: Guide, two: Guide) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def close(one: Path, two: Path) -> bool:
    """Whether two runs gave the same guide, up to the order of sums."""
    a, b = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    return all(torch.allclose(v, b[k], rtol=1e-3, atol=1e-5) for k, v in a.items())


def on_two_processes(
    config: TrainingConfig, command: str = "distill", script: Path | None = None
) -> None:
    """A command, or a script that runs it, on two processes."""
    file, log = (Path(config.output).with_suffix(end) for end in (".json", ".log"))
    config.save(file)
    run = Forked(command, "--config", str(file), log=log, script=script, processes=2)
    assert run.wait() == 0, log.read_text(errors="replace")[-3000:]


def launched(config: TrainingConfig) -> None:
    """The same by torch's own launcher."""
    file = Path(config.output).with_suffix(".json")
    config.save(file)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "pilotfish", "distill", "--config", str(file)], capture_output=True, text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
