"""What the tests of stage 1 do again and again."""

from __future__ import annotations

import torch

from pilotfish.guides import Guide, TinyGuide
from pilotfish.training.config import DistillConfig
from pilotfish.training.guidance_stage import GuidanceDistillation
from pilotfish.training.material import Material

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]


def train(config: DistillConfig, material: Material) -> Guide:
    torch.manual_seed(0)
    guide = TinyGuide.for_denoiser(
        material.pipe.unet, material.schedule.prediction_type, rank=4, condition=4
    )
    return GuidanceDistillation(config, material, guide, notice=lambda line: None).run()


def same(one: Guide, two: Guide) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
