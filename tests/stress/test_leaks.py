"""Memory, tensors and hooks after many images and many attachments."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from statistics import median
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import sample
from pilotfish.teacher import checksum
from tests.stress.page import LONG

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GROWTH = 16.0
"""MiB that the process may grow by; an image's worth for each would be far more."""
SLACK = 16384
"""Bytes that Python may hold more, whatever the number of attachments: it varies by some 5,000."""
PROMPTS = ["owl", "red apple", "a rocket in the rain"] if LONG else ["cat", "a dog"]
Record = Callable[[str, dict[str, float]], None]
Draw = Callable[..., torch.Tensor]


def resident() -> float:
    """Memory of this process in RAM, in MiB."""
    return psutil.Process().memory_info().rss / 2**20


def live_tensors() -> int:
    """Tensors that anything still holds."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def networks(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def hooks(roots: list[nn.Module]) -> int:
    """Hooks of every kind on every module."""
    modules = [module for root in roots for module in root.modules()]
    return sum(len(getattr(module, kind)) for module in modules for kind in HOOKS)


def draw_many(pipe: Any, guide: Guide, images: int) -> dict[str, float]:
    """Draw as many images again after a warm-up, in batches of 8 and 1; the figures."""

    def draw(first: int, number: int) -> torch.Tensor:
        seeds = range(first, first + number)
        made = sample(
            pipe, [PROMPTS[s % len(PROMPTS)] for s in seeds], seeds=seeds, guide=guide,
            guidance_scale=2.0 + first % 5, num_inference_steps=4, batch_size=number,
        )  # fmt: skip
        images = [one.image for one in made]
        return images[0]

    first, sizes = draw(0, 1), (8, 1)
    alive, memory = [], [0.0]
    before = 0.0
    for number in (min(images, 200), images):
        done, before = 0, resident()
        memory = []
        while done < number:
            size = min(sizes[len(memory) % 2], number - done)
            draw(done, size)
            done += size
            memory.append(resident())
        alive.append(live_tensors())
    assert torch.equal(draw(0, 1), first), "the first image differs at the end"
    return {
        "images": images, "MiB of the process": before,
        "MiB of growth": median(memory[-max(images // 100, 1) :]) - before,
        "tensors left": alive[1] - alive[0],
    }  # fmt: skip


def test_images_leave_nothing_behind(model: Any, guide: Guide, record: Record) -> None:
    figures = draw_many(model, guide, 1000 if LONG else 18)
    assert figures["tensors left"] <= 0
    assert figures["MiB of growth"] <= GROWTH
    record("images", figures)


@pytest.mark.skipif(LONG, reason="checks the check")
def test_a_leak_of_one_tensor_an_image_is_noticed(model: Any, guide: Guide) -> None:
    kept: list[torch.Tensor] = []
    guide.register_forward_pre_hook(lambda _, args: kept.append(args[0].latents))
    assert draw_many(model, guide, 9)["tensors left"] > 0


def attach_often(pipe: Any, guide: Guide, draw: Draw, attachments: int) -> dict[str, float]:
    """Attach and detach so many times after a warm-up; what was left."""

    def held() -> dict[str, float]:
        gc.collect()
        return {
            "hooks left": hooks([*networks(pipe), guide]),
            "attributes left": len(vars(pipe)),
            "classes left": len(type(pipe).__subclasses__()),
            "tensors left": live_tensors(),
            "objects left": len(gc.get_objects()),
            "Python bytes left": tracemalloc.get_traced_memory()[0],
            "MiB left": resident(),
        }

    plain = draw(pipe)
    with guide.attached(pipe):
        guided = draw(pipe)
    weights = [checksum(network) for network in (*networks(pipe), guide)]
    own, found = type(pipe), []
    tracemalloc.start()
    try:
        for number in (min(20, attachments), attachments):  # nothing but the number differs
            for i in range(number):
                guide.attach(pipe)
                images_differ = i % 100 == 0 and not torch.equal(draw(pipe), guided)
                guide.detach(pipe)
                images_differ |= i % 100 == 0 and not torch.equal(draw(pipe), plain)
                assert not images_differ
            found.append(held())
    finally:
        tracemalloc.stop()
    assert type(pipe) is own
    assert weights == [checksum(network) for network in (*networks(pipe), guide)]
    return {"attachments": attachments} | {k: n - found[0][k] for k, n in found[1].items()}


def test_attachments_leave_nothing_behind(
    model: Any, guide: Guide, draw: Draw, record: Record
) -> None:
    figures = attach_often(model, guide, draw, 1000 if LONG else 40)
    for name in ("hooks left", "attributes left", "classes left", "tensors left"):
        assert figures[name] <= 0, name
    # another thread of the process, or a cache, may keep an object; a leak leaves many
    assert figures["objects left"] <= figures["attachments"] // 10
    assert figures["Python bytes left"] < SLACK
    record("attachments", figures)


@pytest.mark.skipif(LONG, reason="checks the check")
def test_a_hook_that_stays_is_noticed(
    model: Any, guide: Guide, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach = type(guide).attach

    def leaking(self: Any, pipe: Any) -> None:
        attach(self, pipe)
        pipe.vae.register_forward_hook(lambda *_: None)

    monkeypatch.setattr(type(guide), "attach", leaking)
    assert attach_often(model, guide, draw, 10)["hooks left"] == 10
