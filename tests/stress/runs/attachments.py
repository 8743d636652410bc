"""``attach``: a guide put on a pipeline and taken off, over and over, and what that leaves."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch

from tests.stress.runs.memory import hooks, resident, tensors_alive, weights
from tests.stress.runs.result import Figures, Progress, require
from pilotfish.evaluation.results import modules
from pilotfish.guides import Guide

WARM_UP = 20
SLACK = 4096
"""Bytes that may be left whatever the number: those of the trials' own counters."""
EVERY = 100
"""A guided picture is drawn while attached, and another by CFG after, once in so many times."""


def many_attachments(
    pipe: Any, guide: Guide, draw: Callable[[Any], torch.Tensor], *, attachments: int,
    progress: Progress,
) -> Figures:  # fmt: skip
    """Attach and detach so many times.

    Args:
        draw: a picture of the pipeline, as tensor, the same at every call.

    Raises:
        EnduranceError: a hook, an attribute, a class, a tensor or memory was left, a weight
            changed, or a picture did.
    """

    def once(drawing: bool) -> None:
        guide.attach(pipe)
        if drawing:
            require(torch.equal(draw(pipe), guided), "a guided picture came out otherwise")
        guide.detach(pipe)
        if drawing:
            require(torch.equal(draw(pipe), plain), "a picture by CFG came out otherwise")

    def held() -> dict[str, float]:
        gc.collect()
        return {
            "hooks": hooks(modules(pipe).values()) + hooks([guide]),
            "attributes": len(vars(pipe)),
            "classes": len(type(pipe).__subclasses__()),
            "tensors": tensors_alive(),
            "objects": len(gc.get_objects()),
            "python_bytes": tracemalloc.get_traced_memory()[0],
            "mib": resident(),
        }

    plain = draw(pipe)
    with guide.attached(pipe):
        guided = draw(pipe)
    own, bytes_before, found = type(pipe), weights(pipe, guide), []
    tracemalloc.start()
    try:
        for number in (WARM_UP, attachments):  # told apart by nothing but their number
            for i in range(number):
                once(drawing=i % EVERY == 0)
                progress("attachments", i + 1, number)
            found.append(held())
    finally:
        tracemalloc.stop()
    left = {name: after - found[0][name] for name, after in found[1].items()}
    same = weights(pipe, guide) == bytes_before
    require(type(pipe) is own, "the pipeline is of another class afterwards")
    require(same, "a weight changed")
    # another thread of the process, or a cache, may keep an object; what leaks leaves many
    allowed = {"objects": attachments // 10}
    for name in ("hooks", "attributes", "classes", "tensors", "objects"):
        require(
            left[name] <= allowed.get(name, 0),
            f"{left[name]} {name} were left by {attachments} attachments",
        )
    require(
        left["python_bytes"] < SLACK,
        f"{left['python_bytes']} bytes were left by {attachments} attachments",
    )
    return {
        "attachments": attachments, **{f"{name}_left": n for name, n in left.items()},
        "weights_changed": 0.0 if same else 1.0,
    }  # fmt: skip
