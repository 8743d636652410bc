"""The average of several guides: the mean of their weights.

Guides that were trained from one initialisation in other orders or on other fine-tunes lie around
one minimum, and their mean is often better than any of them (model soups, arXiv 2203.05482). It is
not always better, so measure it. It costs nothing at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TypeVar

import torch

from pilotfish.guides.base import Guide
from pilotfish.interface import GuideError

G = TypeVar("G", bound=Guide)


@torch.no_grad()
def average_guides(guides: Sequence[G]) -> G:
    """The mean of guides of one kind, settings and base.

    Args:
        guides: one or more; they stay as they are.

    Returns:
        A guide in float32, all of them counting alike.

    Raises:
        GuideError: there is none, or two differ in their settings; it names those.
    """
    if not guides:
        raise GuideError("an average needs at least one guide")
    first = guides[0]
    for i, other in enumerate(guides[1:], 2):
        mine, theirs = _made_with(first), _made_with(other)
        if differs := [k for k in mine | theirs if mine.get(k) != theirs.get(k)]:
            raise GuideError(
                f"guide {i} and the first cannot be averaged: they differ in {', '.join(differs)}"
            )
    made = deepcopy(first).float()
    states = [guide.state_dict() for guide in guides]
    for name, tensor in made.state_dict().items():
        tensor.copy_(sum(state[name].double() for state in states) / len(states))
    return made


def _made_with(guide: Guide) -> dict[str, object]:
    """All in which guides of one mean must agree."""
    return {"type": type(guide).__name__, "base": guide.trained_on, **guide.settings()}
