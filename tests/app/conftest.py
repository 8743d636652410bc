"""A studio of tiny pipelines: noise for pictures, but every part is real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from pilotfish.app.drawing import Studio
from pilotfish.app.request import Request
from pilotfish.evaluation.ways import WAYS
from pilotfish.guides import TinyGuide
from pilotfish.pipelines.sampling import sample
from tests import components

Expected = Callable[[Request], dict[str, torch.Tensor]]


def pipeline(seed: int) -> Any:
    """A whole pipeline; the seed is that of its denoiser."""
    tokenizer = components.tokenizer()
    pipe = StableDiffusionPipeline(
        vae=components.autoencoder(), text_encoder=components.text_encoder(tokenizer),
        tokenizer=tokenizer, unet=components.unet(seed),
        scheduler=components.scheduler("epsilon"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guide(seed: int, **config: Any) -> TinyGuide:
    """A guide whose every parameter has moved."""
    made = TinyGuide.for_denoiser(components.unet(), "epsilon", rank=4, head=4, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def guides() -> dict[str, TinyGuide]:
    return {"tiny": guide(4), "other": guide(5)}


@pytest.fixture(scope="session")
def studio() -> Studio:
    """Two hosts and two guides."""
    return Studio({"base": pipeline(0), "tuned": pipeline(1)}, guides())


@pytest.fixture(scope="session")
def expected() -> Expected:
    """A function that draws a request by the library alone, way by way; (3, H, W)."""
    pipes, known = {"base": pipeline(0), "tuned": pipeline(1)}, guides()

    def draw(request: Request) -> dict[str, torch.Tensor]:
        w = request.guidance_scale
        calls = {"none": (1.0, None), "cfg": (w, None), "guided": (w, known[request.guide])}
        drawn = {}
        for way in WAYS:
            scale, network = calls[way]
            (one,) = sample(
                pipes[request.host], [request.prompt], seeds=[request.seed], guidance_scale=scale,
                num_inference_steps=request.num_inference_steps, guide=network,
                negative_prompts=[request.negative_prompt] if request.negative_prompt else None,
            )  # fmt: skip
            drawn[way] = one.image
        return drawn

    return draw
