"""ComfyUI draws what diffusers draws, from one noise and one pair of prompts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from pilotfish_comfyui.loading import apply_guide
from unets import (
    KINDS,
    SD15,
    SDXL,
    Kind,
    Prompt,
    comfyui_model,
    draw_comfyui,
    draw_diffusers,
    on_comfyui,
    pipeline,
    tiny_guide,
)

STEPS, W = 4, 4.0
PARTS = ("text", "attention", "modulation", "layers", "head")
BOUND = 2e-4
"""Largest difference of latents of up to 50, in float32: sums are in another order."""


def draw_both(kind: Kind, guide: Any, refresh: int = 0, w: float = W, n: int = 1) -> Any:
    """The latents of diffusers and of ComfyUI."""
    model, prompt, negative = comfyui_model(kind), Prompt.random(5, n), Prompt.random(2)
    conditionings = prompt.conditioning(), negative.conditioning()
    if guide is None:
        theirs = draw_diffusers(kind, pipeline(kind), prompt, negative, w, STEPS, n)
        return theirs, draw_comfyui(model, *conditionings, w, STEPS, n)
    with guide.attached(pipeline(kind), refresh=refresh) as pipe:
        theirs = draw_diffusers(kind, pipe, prompt, negative, w, STEPS, n)
    model = apply_guide(model, on_comfyui(guide), refresh)
    return theirs, draw_comfyui(model, *conditionings, w, STEPS, n)


@cache
def plain(kind: Kind, w: float) -> Any:
    """The same without a guide."""
    return draw_both(kind, None, w=w)


def report(what: str, theirs: torch.Tensor, ours: torch.Tensor) -> float:
    most = float((theirs - ours).abs().max())
    print(f"\n{what}: maximum difference {most:.2g}, values up to {theirs.abs().max():.3g}")
    return most


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("refresh", [0, 2])
def test_guided(kind: Kind, refresh: int) -> None:
    theirs, ours = draw_both(kind, tiny_guide(kind), refresh)
    cfg, _ = plain(kind, W)
    assert report(f"{kind.name}, guided, refresh={refresh}", theirs, ours) < BOUND
    assert (theirs - cfg).abs().max() > 20 * BOUND


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("w", [1.0, W])
def test_without_guide(kind: Kind, w: float) -> None:
    assert report(f"{kind.name}, w={w:g}", *plain(kind, w)) < BOUND


@pytest.mark.parametrize(
    ("kind", "part"),
    [(k, p) for k in (SD15, SDXL) for p in PARTS if k.xl or p != "modulation"],  # needs pooled text
    ids=lambda given: getattr(given, "name", given),
)
def test_each_part_of_the_guide(kind: Kind, part: str) -> None:
    """A guide of one part: all others are left out."""
    settings = {"text": False, "attention": False, "modulation": False, "rank": 0, "head": 0}
    settings |= {"layers": {"rank": 4}, "head": {"head": 12}}.get(part, {part: True})
    guide = tiny_guide(kind, **settings, uncond_templates=0)
    theirs, ours = draw_both(kind, guide)
    conditional, _ = plain(kind, 1.0)
    assert report(f"{kind.name}, {part} alone", theirs, ours) < BOUND
    assert (theirs - conditional).abs().max() > 20 * BOUND


def test_a_batch_with_one_negative_prompt() -> None:
    theirs, ours = draw_both(SDXL, tiny_guide(SDXL), refresh=1, n=2)
    assert report("SDXL, two images", theirs, ours) < BOUND


def test_a_guide_for_few_steps() -> None:
    """It adds to the prediction of a step with both passes, too."""
    guide = tiny_guide(SD15, times=(0.999, 0.666, 0.333, 0.0))
    assert guide.corrects_refresh
    theirs, ours = draw_both(SD15, guide, refresh=2)
    without, _ = draw_both(SD15, tiny_guide(SD15), refresh=2)
    assert report("SD 1.5, guide for few steps, refresh=2", theirs, ours) < BOUND
    assert (theirs - without).abs().max() > 20 * BOUND
