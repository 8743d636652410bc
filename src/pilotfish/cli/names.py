"""Names on the command line -> pipelines, guides, prompts: embedded ones or the user's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from pilotfish import bundled
from pilotfish.errors import in_brief
from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.spread import device
from pilotfish.guides import Guide
from pilotfish.pipelines import check
from pilotfish.pipelines.loading import load_pipeline, take_ddim_steps


def host(name: str) -> Any:
    """An embedded host (base, fluent, twemoji, emojione) or a pipeline's folder or hub id."""
    if name in bundled.MODELS:
        return bundled.load_model(name)
    return load_pipeline(name)


def guide(name: str) -> Guide:
    """An embedded guide (tiny, or tiny-16, tiny-8, tiny-4 for so many steps) or a guide's folder
    or hub id."""
    return bundled.open_guide(name)


def steps(pipe: Any, network: Guide | None, wanted: int | None) -> int:
    """Sampling steps where ``wanted`` may be left out: 25, or those that a guide was distilled
    to. Such a guide also gets the scheduler that takes them.

    Raises:
        GuideError: the pipeline cannot take the guide.
    """
    if network is not None:
        check(network, pipe)
    known = network and network.timesteps
    if not known:
        return 25 if wanted is None else wanted
    take_ddim_steps(pipe)
    return len(known) if wanted is None else wanted


def usable(device: str) -> str:
    """The device that ``--device`` names.

    Raises:
        ValueError: this machine has none such, or this torch cannot use it.
    """
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used: {in_brief(error)}") from error
    return device


def measured(name: str) -> Any:
    """A host where this process measures it."""
    return host(name).to(device())


def judge(folder: str | None, hosts: Sequence[str]) -> Judge:
    """The embedded judge or one of the user's, where this process measures. The embedded one
    knows small pictures of emoji alone, and warns of hosts that may draw anything else."""
    if folder is None and (others := [name for name in hosts if name not in bundled.MODELS]):
        warnings.warn(
            f"{others[0]} is judged by the embedded judge, which knows 64x64 pictures of emoji "
            "alone; --judge FOLDER names a CLIP of yours", stacklevel=2,
        )  # fmt: skip
    found = Judge.from_folder(folder) if folder else Judge.embedded()
    found.model.to(device())
    return found
