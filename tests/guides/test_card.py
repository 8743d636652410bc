"""The call in a guide's card, which is that of its family's pipelines."""

from __future__ import annotations

import pytest

from pilotfish.guides.card import model_card
from tests.pipelines.pipelines import guide

FOUR = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "times", "lines"),
    [
        ("SD", None, ['image = pipe("an owl", guidance_scale=4, num_inference_steps=25).images']),
        ("SD", FOUR, ["DDIMScheduler.from_config", "num_inference_steps=4).images"]),
        ("SD3", FOUR, ["guidance_scale=4, sigmas=[1, 0.75, 0.5, 0.25]).images"]),
        ("CogView4", FOUR, ["timesteps=[1000, 750, 500, 250]).images"]),
        ("Qwen-Image", None, ['true_cfg_scale=4, negative_prompt=" ", num_inference_steps=25)']),
        ("Z-Image", None, ["guidance_scale=3, num_inference_steps=25)"]),
        ("Wan", FOUR, ["use_deterministic_scheduler(pipe)", "num_inference_steps=4).frames[0]"]),
    ],
)
def test_the_call_is_that_of_the_family(name: str, times: list[float], lines: list[str]) -> None:
    card = model_card(guide(name, times=times), {})
    assert all(line in card.text for line in lines)
    assert ("DDIM" in card.text) == (name == "SD" and times is not None)
    assert ("use_deterministic_scheduler" in card.text) == (name == "Wan")
    assert card.data.pipeline_tag == f"text-to-{'video' if name == 'Wan' else 'image'}"
