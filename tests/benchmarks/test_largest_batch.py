"""How many pictures at once a device holds: counted without memory, and as a real step takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.test_shapes import SMALL, SMALL_XL

from benchmarks.largest_batch import largest, largest_batches, step_bytes
from benchmarks.live_bytes import LiveBytes
from benchmarks.shapes import Shape, Steps


@given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=3), st.integers(0, 3000))
def test_the_largest_fits_and_one_more_does_not(first: int, grown: list[int], memory: int) -> None:
    def taken(n: int) -> float:
        rounds, rest = divmod(n, len(grown))
        return first + rounds * sum(grown) + sum(grown[:rest])

    n = largest(taken, memory)
    assert memory < taken(n + 1)
    assert n == 0 or taken(n) <= memory


@pytest.mark.parametrize("config", [SMALL, SMALL_XL])
@pytest.mark.parametrize("way", ["plain", "cfg", "tiny", "full"])
def test_what_is_counted_is_what_a_real_step_takes(config: Any, way: str) -> None:
    shape = Shape(config)
    with LiveBytes() as live:
        steps = Steps(shape, torch.device("cpu"), torch.float32)
        live.most = before = live.now
        steps.step(way, 3)
    guide = [p for name in steps.guides if name == way for p in steps.guides[name].parameters()]
    weights = sum(p.nbytes for p in [*steps.unet.parameters(), *guide])
    assert step_bytes(shape, torch.float32, way, 3) == weights + live.most - before


def test_cfg_holds_half_as_many_and_a_guide_nearly_all() -> None:
    shape = Shape(SMALL | {"sample_size": 32})
    taken = {way: step_bytes(shape, torch.float16, way, 12) for way in ("plain", "tiny")}
    assert step_bytes(shape, torch.float16, "cfg", 6) == taken["plain"]
    found = largest_batches(shape, torch.float16, taken["plain"] + 100, around=100)
    assert (found["plain"], found["cfg"]) == (12, 6)
    assert found["tiny"] < 12
    assert largest_batches(shape, torch.float16, taken["tiny"])["tiny"] == 12
    assert largest_batches(shape, torch.float16, taken["tiny"] - 1)["tiny"] == 11
    assert set(largest_batches(shape, torch.float16, 10).values()) == {0}
