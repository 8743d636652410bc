"""A session of tiny random pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from pilotfish.app.session import Session
from pilotfish.guides import TinyGuide
from tests import components


def pipeline(seed: int, prediction_type: str = "epsilon") -> Any:
    """A whole pipeline; the seed is that of its denoiser."""
    tokenizer = components.tokenizer()
    pipe = StableDiffusionPipeline(
        vae=components.autoencoder(), text_encoder=components.text_encoder(tokenizer),
        tokenizer=tokenizer, unet=components.unet(seed),
        scheduler=components.scheduler(prediction_type), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guide(seed: int, **config: Any) -> TinyGuide:
    """A guide with random parameters."""
    made = TinyGuide.for_denoiser(components.unet(), "epsilon", rank=4, head=4, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


@pytest.fixture(scope="session")
def session() -> Session:
    """Two models; two guides for any number of steps, and one for two."""
    models = {"base": pipeline(0), "tuned": pipeline(1)}
    few = guide(6, times=[0.999, 0.499])
    return Session(models, {"tiny": guide(4), "other": guide(5), "few": few})
