"""``images``: many pictures in one process, and the memory that they leave behind."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from tests.stress.runs.memory import resident, tensors_alive
from tests.stress.runs.result import Figures, Progress, require
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import sample

BATCHES = (8, 1)
"""Sizes of the calls, in turn."""
GROWTH = 16.0
"""MiB that the process may grow by: far less than a picture's worth for each."""


def many_images(
    pipe: Any, guide: Guide, prompts: list[str], *, images: int, warm_up: int, seed: int,
    progress: Progress, num_inference_steps: int = 4,
) -> Figures:  # fmt: skip
    """Draw ``images`` guided pictures after ``warm_up`` others, in batches of 8 and 1.

    Raises:
        EnduranceError: memory grew, tensors were left, or the first picture came out otherwise
            at the end.
    """

    def draw(first: int, number: int) -> list[torch.Tensor]:
        seeds = range(first, first + number)
        texts = [prompts[s % len(prompts)] for s in seeds]
        made = sample(
            pipe, texts, seeds=seeds, guidance_scale=2.0 + first % 5, guide=guide,
            num_inference_steps=num_inference_steps, batch_size=number,
        )  # fmt: skip
        return [one.image for one in made]

    (first,) = draw(seed, 1)
    held: list[float] = []
    alive, before = [], 0.0
    for name, number in (("warm-up", warm_up), ("images", images)):
        done = turn = 0
        before = resident()
        while done < number:
            size = min(BATCHES[turn % len(BATCHES)], number - done)
            draw(seed + done, size)
            done, turn = done + size, turn + 1
            held.append(resident())
            progress(name, done, number)
        alive.append(tensors_alive())
    (last,) = draw(seed, 1)
    left = alive[1] - alive[0]
    growth = median(held[-max(images // 100, 1) :]) - before
    require(torch.equal(first, last), "the first picture comes out otherwise at the end")
    require(left <= 0, f"{left} tensors were left by {images} pictures")
    require(growth <= GROWTH, f"{images} pictures grew the process by {growth:.1f} MiB")
    return {
        "images": images, "warm_up": warm_up, "num_inference_steps": num_inference_steps,
        "resident_mib": before, "growth_mib": growth, "tensors_left": left,
    }  # fmt: skip
