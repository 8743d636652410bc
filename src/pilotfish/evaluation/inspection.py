"""What a guide adds at each of its sites, from noise to image, as figures and as plots.

*Plug-and-Play Diffusion Distillation* (arXiv 2406.01954) shows such maps for several scales:
strong and coarse early, along the layout of the image in the middle, weak and fine late, and
growing with w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from pilotfish.evaluation.plots import LIGHT, SIZE, Theme, legend, line_style, prepare_axes
from pilotfish.guides import Guide
from pilotfish.interface import GuideInputs, GuideOutput, ResidualFunction
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.sampling import sample


@dataclass(frozen=True)
class Added:
    """What was added at one site in one step.

    Attributes:
        site: the name of a module, ``text``, ``skip <i>`` or ``mid block``.
        time: normalised, in [0, 1]; 1 is noise.
        guidance_scale: w.
        strength: root mean square over batch, channels and pixels.
        map: (h, w) root mean square over batch and channels; None where there are no pixels.
    """

    site: str
    time: float
    guidance_scale: float
    strength: float
    map: torch.Tensor | None


def inspect(
    pipe: Any,
    guide: Guide,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    guidance_scales: Sequence[float] = (2.0, 4.0, 6.0, 8.0),
    num_inference_steps: int = 25,
    num_frames: int | None = None,
) -> list[Added]:
    """Sample the prompts at every scale, from the same noise, and record all that is added.

    Args:
        num_frames: of a video; left out, the pipeline's own number.
    """
    found: list[Added] = []
    for w in guidance_scales:
        with _recording(guide, w, found):
            for _ in sample(
                pipe, prompts, seeds=range(seed, seed + len(prompts)), guidance_scale=w,
                num_inference_steps=num_inference_steps, num_frames=num_frames,
                batch_size=len(prompts), guide=Refreshed(guide, 0),
            ):  # fmt: skip
                pass
    return found


def added_maps(found: Sequence[Added], site: str, columns: int = 8, theme: Theme = LIGHT) -> Figure:
    """What a guide adds at one site: a row for each w, noise on the left; one scale of
    brightness for all."""
    maps = {
        (a.guidance_scale, a.time): a.map.numpy()
        for a in found
        if a.site == site and a.map is not None
    }
    steps = sorted({t for _, t in maps}, reverse=True)
    columns = min(columns, len(steps))
    shown = [steps[round(i * (len(steps) - 1) / max(columns - 1, 1))] for i in range(columns)]
    scales = sorted({w for w, _ in maps})
    top = max(float(m.max()) for m in maps.values())
    figure = Figure(figsize=(1.0 * columns + 0.8, 1.0 * len(scales) + 0.8), layout="constrained")
    grid = figure.subplots(len(scales), columns, squeeze=False)
    for row, w in zip(grid, scales, strict=True):
        row[0].set_ylabel(f"w = {w:g}", color=theme.ink)
        for axes, t in zip(row, shown, strict=True):
            axes.imshow(maps[w, t], vmin=0, vmax=top, cmap="magma")
            axes.set_xticks([])
            axes.set_yticks([])
    for axes, t in zip(grid[0], shown, strict=True):
        axes.set_title(f"t = {t:.2f}", fontsize=8.5, color=theme.ink)
    figure.suptitle(f"Added at {site}", x=0.01, ha="left", fontsize=11, color=theme.ink)
    return figure


def added_strength(found: Sequence[Added], site: str, theme: Theme = LIGHT) -> Figure:
    """How strong it is at one site over time, a line for each w."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    prepare_axes(axes, f"Strength at {site}", "time (noise → image)", theme)
    scales = sorted({a.guidance_scale for a in found})
    for i, w in enumerate(scales):
        here = [a for a in found if a.site == site and a.guidance_scale == w]
        points = sorted((a.time, a.strength) for a in here)
        axes.plot(*zip(*points, strict=True), **line_style(theme, i, size=3), label=f"w = {w:g}")
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    axes.set_ylabel("root mean square")
    legend(axes, theme)
    return figure


@contextmanager
def _recording(guide: Guide, w: float, found: list[Added]) -> Iterator[None]:
    """Every output of the guide is recorded."""

    def record(site: str, time: float, added: torch.Tensor | None) -> None:
        if added is not None:
            power = added.detach().float().pow(2)
            maps = power.mean((0, 1)).sqrt().cpu() if added.ndim == 4 else None
            found.append(Added(site, time, w, float(power.mean().sqrt()), maps))

    def at_module(site: str, time: float, residual: ResidualFunction) -> ResidualFunction:
        def recorded(entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            changed = residual(entered, made)
            record(site, time, changed - made)
            return changed

        return recorded

    def on_output(module: Guide, args: tuple[GuideInputs, ...], output: GuideOutput) -> GuideOutput:
        inputs = args[0]
        time = round(float(inputs.time[0]), 4)
        record("text", time, output.text)
        if output.text_gain is not None:
            record("text", time, output.text_gain * inputs.text.minus(inputs.negative))
        if output.encoder is not None:
            skips, mid = output.encoder
            for i, added in enumerate(skips):
                record(f"skip {i}", time, added)
            record("mid block", time, mid)
        residuals = {s: at_module(s, time, r) for s, r in output.residuals.items()}
        return replace(output, residuals=residuals)

    handle = guide.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()
