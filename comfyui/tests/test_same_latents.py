"""ComfyUI draws what diffusers draws, from one noise and one pair of prompts."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import mmdits
import pytest
import unets
from kinds import Kind, W, draw_comfyui, draw_diffusers, on_comfyui, report
from mmdits import BUNDLED, SD3, SD35
from pilotfish_comfyui.loading import apply_guide
from unets import SD15, SDXL

KINDS = (*unets.KINDS, *mmdits.KINDS)
PARTS: dict[str, dict[str, Any]] = {
    "text": {"text": True}, "attention": {"attention": True},
    "sampled attention": {"attention": True, "joint_attention": "sampled", "image_tokens": 8},
    "cached attention": {"attention": True, "negative_stream": "cached"},
    "modulation": {"modulation": True}, "layers": {"rank": 4}, "head": {"head": 12},
}  # fmt: skip
"""Settings of a guide's parts. Joint attention has several forms."""


def has(kind: Kind, part: str) -> bool:
    """Whether a guide of a denoiser has a part."""
    needed = {"modulation": kind.takes_pooled}
    needed |= dict.fromkeys(("sampled attention", "cached attention"), kind.joint_attention)
    return needed.get(part, True)


def draw_both(kind: Kind, guide: Any, refresh: int = 0, w: float = W, n: int = 1) -> Any:
    """The latents of diffusers and of ComfyUI."""
    model, pipe = kind.model(), kind.pipeline
    if guide is not None:
        model = apply_guide(model, on_comfyui(guide), refresh)
    with nullcontext() if guide is None else guide.attached(pipe, refresh=refresh):
        theirs = draw_diffusers(kind, pipe, *kind.prompts(n), w, n)
    return theirs, draw_comfyui(model, *kind.conditionings(n), w, n=n)


@cache
def plain(kind: Kind, w: float) -> Any:
    """The same without a guide."""
    return draw_both(kind, None, w=w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refresh", [0, 2])
def test_guided(kind: Kind, refresh: int) -> None:
    theirs, ours = draw_both(kind, kind.guide(), refresh)
    cfg, _ = plain(kind, W)
    assert report(f"{kind.name}, guided, refresh={refresh}", theirs, ours) < kind.bound
    assert (theirs - cfg).abs().max() > 20 * kind.bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("w", [1.0, W])
def test_without_guide(kind: Kind, w: float) -> None:
    assert report(f"{kind.name}, w={w:g}", *plain(kind, w)) < kind.bound


@pytest.mark.parametrize(
    ("kind", "part"),
    [(k, part) for k in (SD15, SDXL, BUNDLED, SD35) for part in PARTS if has(k, part)],
)
def test_each_part_of_the_guide(kind: Kind, part: str) -> None:
    """A guide of one part: all others are left out."""
    none = {"text": False, "attention": False, "modulation": False, "rank": 0, "head": 0}
    theirs, ours = draw_both(kind, kind.guide(**none | PARTS[part], uncond_templates=0))
    conditional, _ = plain(kind, 1.0)
    assert report(f"{kind.name}, {part} alone", theirs, ours) < kind.bound
    assert (theirs - conditional).abs().max() > 20 * kind.bound


@pytest.mark.parametrize("kind", [SDXL, SD35])
def test_a_batch_with_one_negative_prompt(kind: Kind) -> None:
    theirs, ours = draw_both(kind, kind.guide(), refresh=1, n=2)
    assert report(f"{kind.name}, two images", theirs, ours) < kind.bound


@pytest.mark.parametrize(
    ("kind", "times"), [(SD15, (0.999, 0.666, 0.333, 0.0)), (SD3, (1.0, 0.858, 0.602, 0.009))]
)
def test_a_guide_for_few_steps(kind: Kind, times: tuple[float, ...]) -> None:
    """It adds to the prediction of a step with both passes, too."""
    guide = kind.guide(times=times)
    assert guide.corrects_refresh
    theirs, ours = draw_both(kind, guide, refresh=2)
    without, _ = draw_both(kind, kind.guide(), refresh=2)
    assert report(f"{kind.name}, guide for few steps, refresh=2", theirs, ours) < kind.bound
    assert (theirs - without).abs().max() > 20 * kind.bound
