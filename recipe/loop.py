"""One training loop for every stage: resumable by the same command, deterministic by seed.

All randomness of a step comes from a generator seeded by (seed, step), so a resumed run
draws what an uninterrupted one would have drawn, with no generator state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from pilotfish.training.checkpoints import (
    list_checkpoints,
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    prune_checkpoints,
    restore_optimizer,
    save_checkpoint,
)

Modules = Mapping[str, torch.nn.Module]


def warm_flat_cool(step: int, steps: int, warmup: int = 200, cool: float = 0.3) -> float:
    """Learning-rate factor: linear warm-up, flat, half a cosine over the last ``cool``."""
    begin = steps * (1 - cool)
    if step < begin:
        return min(1.0, (step + 1) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - begin) / (steps - begin)))


def train(
    folder: Path,
    modules: Modules,
    loss: Callable[[int, torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    averages: Modules | None = None,
    decay: float = 0.999,
    weight_decay: float = 0.01,
    save_every: int = 200,
) -> None:
    """Minimise ``loss(step, generator)`` over all trainable parameters of ``modules``.

    ``averages`` (same names as ``modules``) are updated as exponential moving averages.
    Continues from the newest checkpoint in ``folder``, if there is one.
    """
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, (0.9, 0.99), weight_decay=weight_decay)
    averages = averages or {}
    saved = list_checkpoints(folder)
    start = 0
    if saved:
        checkpoint = load_checkpoint(saved[-1])
        start = checkpoint.step
        for name, module in modules.items():
            module.load_state_dict(checkpoint.part(f"model.{name}"))
        for name, module in averages.items():
            module.load_state_dict(checkpoint.part(f"average.{name}"))
        restore_optimizer(optimizer, checkpoint.part("optimizer"))
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=folder.name, mininterval=5)
    smooth = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_flat_cool(step, steps)
        value = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate = min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, module in averages.items():
                for average, current in zip(
                    module.parameters(), modules[name].parameters(), strict=True
                ):
                    average.lerp_(current, 1 - rate)
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
        if not math.isfinite(smooth):
            raise RuntimeError(f"{folder.name}: the loss is {smooth} at step {step}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            tensors = {f"optimizer.{k}": v for k, v in optimizer_tensors(optimizer).items()}
            tensors |= {f"model.{k}": v for k, v in module_tensors(modules)}
            tensors |= {f"average.{k}": v for k, v in module_tensors(averages)}
            save_checkpoint(folder, step + 1, tensors, {"loss": smooth})
            prune_checkpoints(folder, 1)
