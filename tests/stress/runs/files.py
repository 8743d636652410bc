"""Damaged guides and checkpoints: what is loaded is what was saved, or an error names the place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.stress.runs.damage import Damage, altered, flipped, truncated
from tests.stress.runs.kills import short_training
from tests.stress.runs.result import Progress, require
from pilotfish.interface import GuideError
from pilotfish.training.checkpoint import CheckpointError, list_checkpoints
from pilotfish.training.stages import GuidanceTrainer, new_guide
from pilotfish.training.trainer import Trainer
from pilotfish.training.context import TrainingContext
from pilotfish.guides import Guide

Outcomes = Counter[str]
"""How often a damage came to an outcome: ``the same`` or ``refused``."""


def damages(folder: Path, flips: int, seed: int) -> Iterator[Damage]:
    """Every damage to every file in a folder."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        yield from truncated(path)
        yield from flipped(path, flips, seed)
        if path.suffix == ".safetensors":
            yield from altered(path)


def damaged_guide(folder: Path, flips: int, seed: int, progress: Progress) -> Outcomes:
    """Load a saved guide after each damage to it.

    Raises:
        EnduranceError: it loaded, though it is not what was saved.
        Exception: anything but a GuideError.
    """
    saved = Guide.from_pretrained(folder)
    whole, config = saved.state_dict(), _plain(saved.config)

    def load(damage: Damage) -> bool:
        guide = Guide.from_pretrained(folder)
        expected = whole
        if damage.kind == "a tensor of another type":  # of less precision it is still a guide
            expected = {k: v.to(whole[k].dtype) for k, v in load_file(damage.path).items()}
        return equal(guide.state_dict(), expected) and _plain(guide.config) == config

    return _each(list(damages(folder, flips, seed)), load, GuideError, folder, progress)


def short_run(folder: Path) -> tuple[Trainer, Path]:
    """Two steps of a small training on the embedded model: one that can go on, and from where."""
    config = replace(
        short_training(folder), output=str(folder / "run"), max_train_steps=2, pool=8,
        replay_capacity=16, validation_steps=2, checkpointing_steps=1,
    )  # fmt: skip
    context = TrainingContext.from_config(config)

    def begun() -> Trainer:
        guide = new_guide(config, context)
        return GuidanceTrainer(config, context, guide, notice=lambda line: None)

    begun().run()
    return begun(), list_checkpoints(folder / "run")[-1]


def damaged_checkpoint(
    run: Trainer, path: Path, flips: int, seed: int, progress: Progress
) -> Outcomes:
    """Go on from a checkpoint after each damage to it.

    Args:
        run: a training that can go on from ``path``.

    Raises:
        EnduranceError: it went on, though from something else than was saved.
        Exception: anything but a CheckpointError.
    """
    streams = run.make_streams(path)

    def state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = run.state.tensors()
        for number, kept in streams.tensors().items():
            tensors |= {f"stream.{number}.{k}": v for k, v in kept.items()}
        copies = {k: v.detach().clone() for k, v in tensors.items()}
        return copies, run.progress.facts() | run.state.facts() | {"step": run.progress.step}

    run.checkpoints.load(path, streams)
    whole, facts = state()

    def load(damage: Damage) -> bool:
        run.checkpoints.load(path, streams)
        tensors, found = state()
        return equal(tensors, whole) and found == facts

    return _each(list(damages(path, flips, seed)), load, CheckpointError, path, progress)


def _each(
    harms: list[Damage], load: Callable[[Damage], bool], refusal: type[Exception], place: Path,
    progress: Progress,
) -> Outcomes:  # fmt: skip
    outcomes: Outcomes = Counter()
    for i, harm in enumerate(harms):
        before = harm.path.read_bytes()
        harm.path.write_bytes(harm.content)
        try:
            same = load(harm)
            require(same, f"{harm.path.name}, {harm.kind}, was loaded as something else")
            outcomes["the same"] += 1
        except refusal as error:
            require(str(place) in str(error), f"{error!r} does not name {place}")
            outcomes["refused"] += 1
        finally:
            harm.path.write_bytes(before)
        progress(place.name, i + 1, len(harms))
    return outcomes


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """The same names, and the same values to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if not k.startswith("_")}
