"""Prompts by their index."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from pilotfish.conditioning import (
    NULL,
    PromptEncoder,
    PromptTable,
    encode_prompts,
    encoded,
    null_prompt,
    some_or_one,
    time_ids,
)
from tests.pipelines import hosts

TEXTS = ["cat", "a red cat", "dog"]


@pytest.fixture(params=["SD", "SDXL"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return hosts.host(request.param).pipe


def test_they_are_encoded_as_the_pipeline_does_it(pipe: Any) -> None:
    expected = pipe.encode_prompt(TEXTS, device="cpu", num_images_per_prompt=1,
                                  do_classifier_free_guidance=True)  # fmt: skip
    prompt, null = encode_prompts(pipe, TEXTS), null_prompt(pipe)
    assert torch.equal(prompt.hidden_states, expected[0])
    torch.testing.assert_close(null.hidden_states, expected[1][:1])
    if isinstance(pipe, StableDiffusionXLPipeline):
        assert torch.equal(prompt.pooled, expected[2])
        torch.testing.assert_close(null.pooled, expected[3][:1])
    else:
        assert prompt.pooled is None
        assert null.pooled is None


def test_kept_or_encoded_on_demand_they_are_the_same(pipe: Any) -> None:
    kept, made = encoded(pipe, TEXTS), encoded(pipe, TEXTS, kept=0)
    assert isinstance(kept, PromptTable)
    assert isinstance(made, PromptEncoder)
    for index in ([2, 0, 2], [NULL, 1, NULL, 0], [NULL, NULL]):
        one, other = (prompts(torch.tensor(index)) for prompts in (kept, made))
        assert len(one) == len(other) == len(index)
        torch.testing.assert_close(one.hidden_states, other.hidden_states)
        if one.pooled is not None:
            torch.testing.assert_close(one.pooled, other.pooled)


def test_the_null_prompt_alone_is_one(pipe: Any) -> None:
    prompts = encoded(pipe, TEXTS)
    assert len(some_or_one(prompts, torch.tensor([NULL] * 3))) == 1
    assert len(some_or_one(prompts, torch.tensor([NULL, 0, 1]))) == 3


def test_sdxl_is_told_the_sizes_that_its_pipeline_tells_it() -> None:
    pipe = hosts.host("SDXL").pipe
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    expected = pipe._get_add_time_ids(
        (side, side), (0, 0), (side, side), torch.float32,
        text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
    )  # fmt: skip
    assert torch.equal(time_ids(pipe), expected)
    assert time_ids(hosts.host("SD").pipe) is None
