"""Names on the command line -> pipelines, guides, devices: bundled ones or the user's own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pilotfish import bundled
from pilotfish.cli import own_baselines
from pilotfish.errors import in_brief
from pilotfish.guides import Guide
from pilotfish.pipelines.attach import check
from pilotfish.pipelines.loading import (
    check_pipeline,
    load_pipeline,
    use_deterministic_scheduler,
)
from pilotfish.pipelines.sampling import Attachable

if TYPE_CHECKING:  # sample and app are installed without what evaluation needs
    from pilotfish.evaluation.clip import Scorer
    from pilotfish.evaluation.images import ModelSource

Dtype = Literal["float32", "bfloat16", "float16"]


def open_model(name: str, dtype: Dtype = "float32", variant: str | None = None) -> Any:
    """A bundled model (one of ``bundled.model_names()``) or a pipeline's folder or hub id."""
    precision = getattr(torch, dtype)
    if name in bundled.model_names():
        return bundled.load_model(name, precision)
    return load_pipeline(name, variant=variant, dtype=precision)


def model_on_device(name: str, dtype: Dtype = "float32", variant: str | None = None) -> Any:
    """A model on the device of this process."""
    from pilotfish.evaluation.processes import device

    return open_model(name, dtype, variant).to(device())


def model_sources(
    names: Sequence[str], reference_images: Sequence[str], dtype: Dtype = "float32",
    variant: str | None = None,
) -> dict[str, ModelSource]:  # fmt: skip
    """Models by name. The folders of reference images belong to those that are not bundled, in
    order.

    Raises:
        ValueError: more folders than such models, or two models of one name; or a folder without
            ``metadata.jsonl``.
        PipelineError: there is no such model.
    """
    from pilotfish.evaluation.images import ModelSource

    folders, models = list(reference_images), dict[str, ModelSource]()
    for name in names:
        is_bundled = name in bundled.model_names()
        called = name if is_bundled else Path(name).name
        if called in models:
            raise ValueError(f"two models are called {called}; rename one of the folders")
        if name in bundled.REFERENCES:
            folder: Path | None = bundled.images(name)
        else:
            folder = Path(folders.pop(0)) if folders and not is_bundled else None
        if not is_bundled:
            check_pipeline(name)  # its turn may come hours later
        models[called] = ModelSource(partial(model_on_device, name, dtype, variant), folder)
    if folders:
        raise ValueError(f"--reference_images {folders[0]} belongs to no model")
    return models


def open_guide(name: str) -> Guide:
    """A bundled guide (:func:`pilotfish.bundled.guide_names`) or a guide's folder or hub id."""
    return bundled.open_guide(name)


def named_methods(texts: Sequence[str]) -> dict[str, list[Attachable]]:
    """Guides, and rules of ``baselines`` in a clone, by name: ``NAME=GUIDE``, or by the last part
    of their path. A path may hold a ``=`` of its own.
    """
    baselines = own_baselines()
    rules: dict[str, Any] = baselines.RULES if baselines else {}
    found: dict[str, list[Attachable]] = {}
    for text in texts:
        name, given = split_name(text)
        rule = rules.get(given)
        found.setdefault(name, []).append(rule() if rule else open_guide(given))
    return found


def split_name(text: str) -> tuple[str, str]:
    """``few=runs/x`` -> (few, runs/x); ``runs/lr=3/guide`` -> (guide, runs/lr=3/guide)."""
    name, joined, given = text.partition("=")
    if joined and "/" not in name and "\\" not in name and not Path(text).exists():
        return name, given
    return Path(text).name, text


def sampling_steps(pipe: Any, guide: Guide | None, wanted: int | None) -> int:
    """The number of sampling steps; left out, 25, or those that a guide was distilled to. Such a
    guide also gets the scheduler that takes them.

    Raises:
        GuideError: the pipeline cannot take the guide.
    """
    if guide is not None:
        check(guide, pipe)
    times = guide and guide.times
    if not times:
        return 25 if wanted is None else wanted
    use_deterministic_scheduler(pipe)
    return len(times) if wanted is None else wanted


def usable_device(name: str) -> str:
    """The device of ``--device``.

    Raises:
        ValueError: this machine has no such device, or this torch cannot use it.
    """
    try:
        torch.empty(1, device=name)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {in_brief(error)}") from error
    return name


def open_scorer(folder: str | None, models: Sequence[str]) -> Scorer:
    """The bundled scorer or one of the user's, on the device of this process. The bundled one
    was trained on small images of emoji, and warns of other models."""
    from pilotfish.evaluation.clip import Scorer
    from pilotfish.evaluation.processes import device

    known = bundled.model_names()
    if folder is None and (others := [name for name in models if name not in known]):
        warnings.warn(
            f"{others[0]} is scored by the bundled CLIP, which was trained on 64x64 images of "
            "emoji alone; --scorer FOLDER names another", stacklevel=2,
        )  # fmt: skip
    found = Scorer.from_folder(folder) if folder else Scorer.bundled()
    found.model.to(device())
    return found
