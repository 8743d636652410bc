"""What a guide adds, place by place, on its way from noise to a picture.

The paper shows such maps for several scales: strong and coarse early, along the layout of the
picture in the middle, weak and fine late, and growing with w.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pilotfish.guides import Guide
from pilotfish.interface import EncoderResidual, GuideInputs, GuideOutput, Residual
from pilotfish.pipelines.sampling import sample


@dataclass(frozen=True)
class Added:
    """What was added at one place in one step.

    Attributes:
        place: the name of a module, ``text``, ``skip <i>`` or ``mid block``.
        timestep: in [0, 1000).
        guidance_scale: w.
        strength: root mean square over batch, channels and pixels.
        map: (h, w) root mean square over batch and channels; None where there are no pixels.
    """

    place: str
    timestep: int
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
) -> list[Added]:
    """Sample the prompts at every scale, from the same noise, and note all that is added."""
    found: list[Added] = []
    for w in guidance_scales:
        with _noting(guide, w, found):
            for _ in sample(
                pipe, prompts, seeds=range(seed, seed + len(prompts)), guidance_scale=w,
                num_inference_steps=num_inference_steps, batch_size=len(prompts), guide=guide,
            ):  # fmt: skip
                pass
    return found


@contextmanager
def _noting(guide: Guide, w: float, found: list[Added]) -> Iterator[None]:
    """Every answer of the guide is noted as it is added."""

    def note(place: str, timestep: int, added: torch.Tensor | None) -> torch.Tensor | None:
        if added is not None:
            power = added.detach().float().pow(2)
            maps = power.mean((0, 1)).sqrt().cpu() if added.ndim == 4 else None
            found.append(Added(place, timestep, w, float(power.mean().sqrt()), maps))
        return added

    def at_module(place: str, timestep: int, addition: Residual) -> Residual:
        def noted(entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            added = addition(entered, made)
            note(place, timestep, added)
            return added

        return noted

    def at_encoder(timestep: int, addition: EncoderResidual) -> EncoderResidual:
        def noted(skips: tuple[torch.Tensor, ...], mid: torch.Tensor) -> Any:
            of_skips, of_mid = addition(skips, mid)
            for i, added in enumerate(of_skips):
                note(f"skip {i}", timestep, added)
            note("mid block", timestep, of_mid)
            return of_skips, of_mid

        return noted

    def answered(module: Guide, args: tuple[GuideInputs], injection: GuideOutput) -> GuideOutput:
        timestep = int(args[0].timestep[0])
        note("text", timestep, injection.text)
        modules = {p: at_module(p, timestep, a) for p, a in injection.modules.items()}
        encoder = injection.encoder and at_encoder(timestep, injection.encoder)
        return replace(injection, modules=modules, encoder=encoder)

    handle = guide.register_forward_hook(answered)
    try:
        yield
    finally:
        handle.remove()
