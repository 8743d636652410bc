"""The training loop of every stage: resumed by the same command, deterministic by its seed.

The randomness of a step comes from a generator seeded by (seed, step). A resumed run draws what
an uninterrupted one would have drawn, with no generator state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

Modules = Mapping[str, torch.nn.Module]
WARMUP_STEPS, COOLDOWN = 200, 0.3


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, constant, half a cosine over the last 30 %."""
    begin = steps * (1 - COOLDOWN)
    if step < begin:
        return min(1.0, (step + 1) / WARMUP_STEPS)
    return 0.5 * (1 + math.cos(math.pi * (step - begin) / (steps - begin)))


def train(
    folder: Path,
    modules: Modules,
    loss: Callable[[int, torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float | Mapping[str, float],
    seed: int,
    averages: Modules | None = None,
    decay: float = 0.999,
    weight_decay: float = 0.01,
    save_every: int = 200,
) -> None:
    """Minimise ``loss(step, generator)`` over all trainable parameters of ``modules``.

    ``learning_rate`` is that of all modules, or of each by its name.
    ``averages`` (same names as ``modules``) are updated as exponential moving averages.
    Continues from the checkpoint in ``folder`` if there is one.
    """
    groups = [[p for p in m.parameters() if p.requires_grad] for m in modules.values()]
    rates = (
        learning_rate
        if isinstance(learning_rate, Mapping)
        else dict.fromkeys(modules, learning_rate)
    )
    optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups], betas=(0.9, 0.99), weight_decay=weight_decay
    )
    parameters = [p for group in groups for p in group]
    averages = averages or {}
    checkpoint = folder / "checkpoint.safetensors"
    start = _load(checkpoint, modules, averages, optimizer) if checkpoint.is_file() else 0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=folder.name, mininterval=5)
    smooth = None
    for step in bar:
        for group, rate in zip(
            optimizer.param_groups, map(rates.__getitem__, modules), strict=True
        ):
            group["lr"] = rate * learning_rate_factor(step, steps)
        value = loss(step, torch.Generator().manual_seed(seed * 1_000_003 + step))
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kept = min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, module in averages.items():
                for average, current in zip(
                    module.parameters(), modules[name].parameters(), strict=True
                ):
                    average.lerp_(current, 1 - kept)
        smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
        bar.set_postfix_str(f"loss {smooth:.4f}", refresh=False)
        if not math.isfinite(smooth):
            raise RuntimeError(f"{folder.name}: the loss is {smooth} at step {step}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            _save(checkpoint, modules, averages, optimizer, step + 1)


def _save(
    path: Path, modules: Modules, averages: Modules, optimizer: torch.optim.Optimizer, step: int
) -> None:
    state = optimizer.state_dict()["state"]
    tensors = {f"optimizer/{i}/{k}": v for i, values in state.items() for k, v in values.items()}
    for kind, group in (("model", modules), ("average", averages)):
        for name, module in group.items():
            tensors |= {f"{kind}/{name}/{k}": v for k, v in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    # a clone of each: safetensors refuses tensors that share memory
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()},
        unfinished, {"step": str(step)},
    )  # fmt: skip
    unfinished.replace(path)


def _load(path: Path, modules: Modules, averages: Modules, optimizer: torch.optim.Optimizer) -> int:
    """Restore everything; return the number of steps done."""
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        step = int(file.metadata()["step"])
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        kind, name, rest = key.split("/", 2)
        parts.setdefault(f"{kind}/{name}", {})[rest] = value
    for kind, group in (("model", modules), ("average", averages)):
        for name, module in group.items():
            module.load_state_dict(parts[f"{kind}/{name}"])
    state = optimizer.state_dict()
    state["state"] = {
        int(key.split("/")[1]): part for key, part in parts.items() if key.startswith("optimizer/")
    }
    optimizer.load_state_dict(state)
    return step
