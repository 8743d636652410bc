"""Refreshing: some steps of a call run both passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pilotfish import GuideError
from pilotfish.backbones import GuidedPass
from pilotfish.interface import Refresh
from pilotfish.refresh import new_refresh, places, refresh_steps
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import Pipeline, build, guide, plain
from tests.pipelines.specs import PIPELINES

ALL = 100
BOTH = 2 * 2
"""The batch of a step with both passes, for two prompts."""


def drawn(one: Pipeline, refresh: Any, name: str, **call: Any) -> torch.Tensor:
    with guide(name).attached(one.pipe, refresh=refresh):
        return one.latents(**call)


def longer(name: str) -> dict[str, Any]:
    """Arguments of a call with four steps."""
    partly = "strength" in PIPELINES[name].call
    return {"num_inference_steps": 6 if partly else 4}


@pytest.mark.parametrize("name", covered("refresh"))
@pytest.mark.usefixtures("encoded_alike")
def test_with_both_passes_in_every_step_the_images_are_those_of_cfg(name: str) -> None:
    torch.testing.assert_close(drawn(build(name), ALL, name), plain(name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", covered("refresh"))
def test_so_many_steps_run_both_passes_as_are_asked_for(name: str) -> None:
    one = build(name)
    with guide(name).attached(one.pipe, refresh=2), one.batches() as sizes:
        one.latents(**longer(name))
    assert len(sizes) >= 4
    assert [i for i, n in enumerate(sizes) if n == BOTH] == list(refresh_steps(2, len(sizes)))
    with guide(name).attached(one.pipe, refresh=[0, 3]), one.batches() as sizes:
        one.latents(**longer(name))
    assert [i for i, n in enumerate(sizes) if n == BOTH] == [0, 3]


@pytest.mark.parametrize("name", covered("refresh"))
def test_a_guide_makes_use_of_what_was_found_and_keeps_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(guided: GuidedPass, *_: torch.Tensor) -> None:
        guided.refresh, guided.refreshing = None, False

    one = build(name)
    with guide(name).attached(one.pipe, refresh=[1]):
        once = one.latents(**longer(name))
        assert torch.equal(one.latents(**longer(name)), once)
        monkeypatch.setattr(GuidedPass, "_found", forgetful)
        assert not torch.equal(one.latents(**longer(name)), once)


@pytest.mark.parametrize("steps", [1, 2, 8, 25])
def test_refreshes_are_so_many_steps_of_a_call(steps: int) -> None:
    assert refresh_steps(3, 25) == (3, 8, 16)
    assert refresh_steps(1, 25) == (8,)
    assert refresh_steps(2, 8, few_steps=True) == (2, 5)
    assert refresh_steps(0, steps) == ()
    for count in range(1, steps):
        found = refresh_steps(count, steps)
        few = refresh_steps(count, steps, few_steps=True)
        assert len(set(few)) == count
        assert max(few) < steps
        assert len(set(found)) == count
        assert list(found) == sorted(found)
        assert 0 <= found[0] <= found[-1] < steps
    assert refresh_steps(steps + 3, steps) == tuple(range(steps))


def test_the_slope_is_the_change_per_unit_of_time() -> None:
    random = torch.Generator().manual_seed(3)
    start, rate = torch.randn(2, 4, 1, 8, 8, generator=random).expand(2, 4, 3, 8, 8)
    then, now = torch.tensor([0.9, 0.9, 0.9, 0.5]), torch.tensor([0.6, 0.4, 0.9, 0.3])
    known = torch.tensor([1.0, 1.0, 1.0, 0.0])
    at = [start + t[:, None, None, None] * rate for t in (then, now)]
    kept = torch.full_like(start, 0.5)
    before = Refresh(then, at[0], start, start, kept, 0.2 * known, known)
    made = new_refresh(at[1] + 1, start, start, now, before)
    found = made.slope
    expected = rate + (1 / (now - then))[:, None, None, None]
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[2], kept[2]), "at the same time it stays"
    torch.testing.assert_close(made.gap, torch.tensor([0.3, 0.5, 0.2, 0.0]))
    assert not found[3].any(), "without a refresh before there is none"


def test_steps_past_the_end_of_a_call_are_left_out() -> None:
    assert places([7, 0, 3], 5) == (0, 3)


def test_a_ratio_is_one_of_the_steps_that_are_made() -> None:
    assert places(0.12, 25) == refresh_steps(3, 25)
    assert places(0.12, 50) == refresh_steps(6, 50)
    assert places(0.0, 8) == ()
    assert places(1.0, 8) == tuple(range(8))


def test_a_guide_has_a_ratio_of_its_own_for_who_names_none() -> None:
    one, used = build("SD"), guide("SD", refresh_ratio=0.5)
    call = {"num_inference_steps": 4}
    with used.attached(one.pipe), one.batches() as sizes:
        one.latents(**call)
    assert [i for i, n in enumerate(sizes) if n == BOTH] == list(refresh_steps(2, 4))
    for none in (used.attached(one.pipe, refresh=0), guide("SD").attached(one.pipe)):
        with none, one.batches() as sizes:
            one.latents(**call)
        assert BOTH not in sizes


@pytest.mark.parametrize("refresh", [-1, 1.5, -0.1, "3", [1, -2], [0.5], True])
def test_what_is_no_number_of_steps_is_refused(refresh: Any) -> None:
    one = build("SD")
    with pytest.raises(GuideError, match="refresh must be a number of steps"):
        guide("SD").attach(one.pipe, refresh=refresh)
