"""What is sampled once and kept on disk: no guidance and CFG, and the fit of LinearAG."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pilotfish.evaluation.images import ScoredImages
from pilotfish.evaluation.metrics import LatentMeter, gain_kept, gain_kept_interval
from pilotfish.evaluation.results import Scores


def kept(
    file: Path, facts: Mapping[str, Any],
    make: Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """Tensors and plain values from a file; made anew, and saved, where it is missing or was made
    of other facts.

    Args:
        facts: all that they depend on, distinguished by their ``repr``.
    """
    made_of = sha256(repr(sorted(facts.items())).encode()).hexdigest()
    try:
        with safe_open(file, framework="pt") as opened:
            found = opened.metadata() or {}
            if found.get("made_of") == made_of:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                return tensors, json.loads(found["values"])
    except (OSError, SafetensorError):
        pass
    tensors, values = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    metadata = {"made_of": made_of, "values": json.dumps(values)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
    part.replace(file)
    return tensors, values


def kept_images(
    file: Path, facts: Mapping[str, Any], sample: Callable[[], ScoredImages]
) -> ScoredImages:
    """Images of one mode as :func:`kept`."""

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        images = sample()
        tensors = {"hits": images.hits, "hits5": images.hits5, "latents": images.latents.cpu()}
        return tensors, {"scores": asdict(images.scores), "passes": images.passes}

    tensors, values = kept(file, facts, make)
    return ScoredImages(Scores(**values["scores"]), **tensors, passes=values["passes"])


def part_of(images: ScoredImages, every: int, count: int) -> ScoredImages:
    """Every so many-th of the images, ``count`` of them. Their scores are those of all."""
    chosen = slice(0, every * count, every)
    return replace(
        images, hits=images.hits[chosen], hits5=images.hits5[chosen],
        latents=images.latents[chosen],
    )  # fmt: skip


def figures(
    own: ScoredImages, none: ScoredImages, cfg: ScoredImages, prompt: torch.Tensor
) -> dict[str, Any]:
    """The figures of an entry that depend on images.

    Args:
        own: of the method.
        none: without guidance, the same prompts and seeds.
        cfg: with CFG.
        prompt: (N,) index of each image's prompt.
    """
    latents = LatentMeter()
    latents.update(own.latents.cpu(), none.latents, cfg.latents)
    interval = gain_kept_interval(none.hits, cfg.hits, own.hits, prompt=prompt)
    first, five = (
        gain_kept(*(float(getattr(images, name).mean()) for images in (none, cfg, own)))
        for name in ("hits", "hits5")
    )
    return {
        "passes": own.passes, "top1": float(own.hits.mean()), "gain_kept": first,
        "interval": (interval.low, interval.high), "top5_kept": five,
        "latent_mse_ratio": latents.compute(), "fd": own.scores.fd_clip, "samples": len(own.hits),
    }  # fmt: skip
