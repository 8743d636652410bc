"""ComfyUI's conditionings in a step: which count, and their texts as a guide takes them.

A conditioning is a list of entries, each with its prompt, an area or mask, and a range of steps.
ComfyUI runs the denoiser for every entry and adds up the predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pilotfish.interface import GuideError

LONGEST = 4
"""How often the shorter of two texts is repeated at most, as in ComfyUI."""


def active(entries: Sequence[dict[str, Any]], sigma: float) -> list[dict[str, Any]]:
    """The entries that count at a noise level."""
    return [
        entry
        for entry in entries
        if entry.get("timestep_start", math.inf) >= sigma >= entry.get("timestep_end", -math.inf)
    ]


def embeds(entry: dict[str, Any]) -> torch.Tensor:
    """(1 or N, L, D) the prompt of an entry.

    Raises:
        GuideError: it has none.
    """
    found = entry["model_conds"].get("c_crossattn")
    if found is None:
        raise GuideError("a conditioning without a prompt takes no guide; use the model without it")
    tensor: torch.Tensor = found.cond
    return tensor


def vector(entry: dict[str, Any]) -> torch.Tensor | None:
    """(1 or N, E) pooled text and sizes of an entry, where the model takes them."""
    found = entry["model_conds"].get("y")
    return None if found is None else found.cond


def check(positive: Sequence[dict[str, Any]], negative: Sequence[dict[str, Any]]) -> None:
    """Refuse what is not tested in one pass.

    Raises:
        GuideError: the entries have weights of their own, positions of objects, or several
            negative prompts; or one for each image of a batch beside several prompts.
    """
    every = [*positive, *negative]
    if any(entry.get("hooks") is not None for entry in every):
        raise GuideError(
            "conditionings with LoRAs of their own (hooks) take no guide; load the LoRA on the "
            "model"
        )
    if any("gligen" in entry for entry in every):
        raise GuideError("GLIGEN conditionings take no guide; use the model without it")
    if any("default" in entry for entry in every):
        raise GuideError("default conditionings take no guide; give one for the whole image")
    first, *others = negative
    if not all(_same(first, other) for other in others):
        raise GuideError(
            f"{len(negative)} different negative conditionings act in one step, and a guide takes "
            "one; combine the prompts in one text, or split them by step"
        )
    if len(positive) > 1 and len(embeds(first)) > 1:
        raise GuideError(
            "several positive conditionings with a batch of negative ones take no guide; give one "
            "negative conditioning"
        )


def check_refresh(positive: Sequence[dict[str, Any]], negative: Sequence[dict[str, Any]]) -> None:
    """Refuse refreshes where the prediction of a step has parts.

    Raises:
        GuideError: naming what to do.
    """
    if len(positive) > 1 or any("area" in entry for entry in (*positive, *negative)):
        raise GuideError(
            f"{len(positive)} positive conditionings or areas act in one step, and a refresh takes "
            "one that covers the image; set refresh to 0"
        )


def with_length(entry: dict[str, Any], length: int) -> dict[str, Any]:
    """An entry with its prompt repeated to ``length`` tokens, which attention does not notice."""
    found = entry["model_conds"]["c_crossattn"]
    if found.cond.shape[1] == length:
        return entry
    longer = type(found)(repeated(found.cond, length))
    return {**entry, "model_conds": {**entry["model_conds"], "c_crossattn": longer}}


def common_length(entries: Sequence[dict[str, Any]]) -> int | None:
    """The length to which all prompts can be repeated, so that tokens correspond; None where that
    is too long. ComfyUI makes texts of several chunks, and does the same to batch them."""
    lengths = [embeds(entry).shape[1] for entry in entries]
    common = math.lcm(*lengths)
    return common if common // min(lengths) <= LONGEST else None


def repeated(text: torch.Tensor, length: int) -> torch.Tensor:
    """(N, L, D) -> (N, length, D)."""
    return text.repeat(1, length // text.shape[1], 1)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(
        x is y or (x is not None and y is not None and torch.equal(x, y))
        for x, y in ((embeds(a), embeds(b)), (vector(a), vector(b)))
    )
