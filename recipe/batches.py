"""Batches that denoisers are trained on: noise, latents of affine views, loose captions.

Some captions are wrong on purpose (``wrong_captions``): that of another image of the same
category. Captions from the web are as loose, and a small model trained on clean captions alone
would hardly need guidance.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from pilotfish.data.images import from_pixels, load_images
from recipe.augment import Restyle, affine
from recipe.text import tokenize


@dataclass(frozen=True)
class DenoiserStage:
    """How a denoiser is trained.

    Attributes:
        drop: share of empty prompts, for the unconditional prediction.
        wrong_captions: share of captions taken from another image of the category.
        views: latents of affine views of each image; the first is the image itself.
        final_views: of these, those used from step ``final_begin`` on. Many views first
            generalise; few later sharpen.
    """

    steps: int = 7000
    batch: int = 64
    learning_rate: float = 8e-4
    drop: float = 0.1
    wrong_captions: float = 0.3
    views: int = 24
    final_begin: int = 2000
    final_views: int = 3
    seed: int = 0


@torch.no_grad()
def latent_views(
    vae: AutoencoderKL, folder: Path, views: int, seed: int, restyle: Restyle = lambda x: x
) -> torch.Tensor:
    """(N, views, C, h, w) latents of affine views; the first view is the image itself."""
    pixels = restyle(from_pixels(load_images(folder).pixels))
    generator = torch.Generator().manual_seed(seed)
    made = [pixels] + [affine(pixels, generator) for _ in range(views - 1)]
    latents = [torch.cat([vae.encode(x).latent_dist.mean for x in m.split(64)]) for m in made]
    return torch.stack(latents, 1) * vae.config.scaling_factor


def sample_times(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n,) logit-normal times in [0, 1], a fifth of them uniform."""
    middle = torch.sigmoid(torch.randn(n, generator=generator))
    flat = torch.rand(n, generator=generator)
    uniform = torch.rand(n, generator=generator) < 0.2
    return torch.where(uniform, flat, middle)


def categories_of(folder: Path) -> list[str]:
    """The category of every image, in the order of ``load_images``."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line)["category"] for line in lines]


class Batch(NamedTuple):
    """Clean latents (N, C, h, w), tokens (N, 16), times (N,) in [0, 1] and noise (N, C, h, w)."""

    latents: torch.Tensor
    tokens: torch.Tensor
    time: torch.Tensor
    noise: torch.Tensor


class Batches:
    """Batches of one style by the step of the training.

    Args:
        vae: encodes the images.
        folder: of the images.
        restyle: changes them first.
    """

    def __init__(
        self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, folder: Path, stage: DenoiserStage,
        restyle: Restyle = lambda x: x,
    ) -> None:  # fmt: skip
        self.stage = stage
        self.latents = latent_views(vae, folder, stage.views, stage.seed, restyle)
        self.tokens = tokenize(tokenizer, load_images(folder).captions)
        self.empty = tokenize(tokenizer, [""])
        categories, members = categories_of(folder), dict[str, list[int]]()
        for i, category in enumerate(categories):
            members.setdefault(category, []).append(i)
        self.neighbours = [torch.tensor(members[c]) for c in categories]

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        n = self.stage.batch
        views = self.stage.views if step < self.stage.final_begin else self.stage.final_views

        def rand() -> torch.Tensor:
            return torch.rand(n, generator=generator)

        pick = torch.randint(len(self.latents), (n,), generator=generator)
        view = torch.randint(views, (n,), generator=generator)
        latents = self.latents[pick, view]
        swap = (rand() < self.stage.wrong_captions).tolist()
        captions_of = [
            int(near[torch.randint(len(near), (1,), generator=generator)]) if s else int(i)
            for i, s, near in zip(pick, swap, [self.neighbours[i] for i in pick], strict=True)
        ]
        tokens = self.tokens[captions_of]
        tokens = torch.where((rand() < self.stage.drop)[:, None], self.empty, tokens)
        time = sample_times(n, generator)
        return Batch(latents, tokens, time, torch.randn(latents.shape, generator=generator))
