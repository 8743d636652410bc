"""The three ways to sample that everything here compares, from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pilotfish.evaluation.spread import gathered, share, whole_batch
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import Attachable, Sample, sample

WAYS = ("none", "cfg", "guided")
TITLES = {"none": "no guidance", "cfg": "CFG", "guided": "guided"}


@dataclass(frozen=True)
class Drawn:
    """A batch, drawn in one way.

    Attributes:
        prompts: N texts.
        latents: (N, C, h, w) final latents.
        images: (N, 3, H, W) in [-1, 1].
    """

    prompts: list[str]
    latents: torch.Tensor
    images: torch.Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Drawn:
        """The samples as one batch."""
        return cls(
            [s.prompt for s in samples],
            torch.stack([s.latents for s in samples]),
            torch.stack([s.image for s in samples]),
        )


def walk(prompts: Sequence[str], samples: int, seed: int) -> tuple[list[str], list[int]]:
    """``samples`` prompts, each with its own seed: an even walk over all of them, so that few
    still come from every category; going round again where there are fewer.

    Raises:
        ValueError: no prompt, or fewer samples than one.
    """
    if not prompts or samples < 1:
        raise ValueError(f"{samples} samples of {len(prompts)} prompts: at least one of each")
    apart = max(1, len(prompts) // samples)
    texts = [prompts[i * apart % len(prompts)] for i in range(samples)]
    return texts, list(range(seed, seed + samples))


def draw(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, guidance_scale: float,
    num_inference_steps: int, guide: Attachable | None = None,
    negative_prompts: Sequence[str] | None = None,
) -> Drawn:  # fmt: skip
    """One batch in one way, each process its share of it."""
    mine = share(len(prompts))
    drawn = Drawn.of(
        list(
            sample(
                pipe, [prompts[i] for i in mine], seeds=[seeds[i] for i in mine],
                guidance_scale=guidance_scale, guide=guide,
                num_inference_steps=num_inference_steps, batch_size=len(mine),
                negative_prompts=negative_prompts and [negative_prompts[i] for i in mine],
            )
        )
    )  # fmt: skip
    return Drawn(list(prompts), *gathered(len(prompts), drawn.latents, drawn.images))


def three_ways(
    pipe: Any, guide: Guide, prompts: Sequence[str], seeds: Sequence[int], *,
    guidance_scale: float, num_inference_steps: int, batch_size: int,
    known: list[dict[str, Drawn]] | None = None,
) -> Iterator[dict[str, Drawn]]:  # fmt: skip
    """Batch after batch, each drawn without guidance, with CFG and with the guide.

    The guide is off the pipeline whenever this yields. Only one batch is alive at a time, unless
    they are kept for the next guide.

    Args:
        known: what does not depend on the guide, batch by batch: taken from here where it is, and
            added where it is not.
        batch_size: of each process.
    """
    settings: dict[str, tuple[float, Guide | None]] = {
        "none": (1.0, None),
        "cfg": (guidance_scale, None),
        "guided": (guidance_scale, guide),
    }
    batch_size = whole_batch(batch_size)
    for number, i in enumerate(range(0, len(prompts), batch_size)):
        texts, some = prompts[i : i + batch_size], seeds[i : i + batch_size]
        drawn = dict(known[number]) if known and number < len(known) else {}
        for way, (w, with_guide) in settings.items():
            if way not in drawn:
                drawn[way] = draw(
                    pipe, texts, some, guidance_scale=w, guide=with_guide,
                    num_inference_steps=num_inference_steps,
                )  # fmt: skip
        if known is not None and number == len(known):
            known.append({way: drawn[way] for way in ("none", "cfg")})
        yield drawn
