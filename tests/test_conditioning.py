"""Prompts by their index."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch

from pilotfish.backbones import Backbone
from pilotfish.conditioning import (
    NULL,
    PromptEncoder,
    PromptTable,
    encode_as,
    encoded,
    some_or_one,
)
from pilotfish.interface import TextConditions
from tests import components
from tests.pipelines import pipelines, specs

TEXTS = ["cat", "a red cat", "dog"]
PIPELINES = {
    "SD": lambda: pipelines.build("SD").pipe,
    "SDXL": lambda: pipelines.build("SDXL").pipe,
    "SD3": components.sd3_pipeline,
    "PixArt": components.pixart_pipeline,
    "Sana": lambda: pipelines.build("Sana").pipe,
    "Lumina2": lambda: pipelines.build("Lumina2").pipe,
}


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> Any:
    made = PIPELINES[request.param]()
    made.name = request.param
    return made


def assert_close(one: TextConditions, other: TextConditions) -> None:
    for name in ("embeds", "pooled", "mask"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs)


def both(pipe: Any, **negative: Any) -> tuple[TextConditions, TextConditions]:
    """Prompts and negative prompts as a call of the pipeline encodes them."""
    more: dict[str, Any] = {"prompt_2": None, "prompt_3": None} if pipe.name == "SD3" else {}
    if pipe.name == "Sana":
        call = signature(type(pipe).__call__).parameters["complex_human_instruction"]
        more = {"complex_human_instruction": call.default}
    made = pipe.encode_prompt(
        prompt=TEXTS, **more, **negative, device="cpu", num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )  # fmt: skip
    if pipe.name in specs.MASKED:
        embeds, mask, other, other_mask = made
        return TextConditions(embeds, mask=mask), TextConditions(other, mask=other_mask)
    embeds, other, *pooled = made
    return TextConditions(embeds, *pooled[:1]), TextConditions(other, *pooled[1:])


def test_prompts_are_encoded_as_the_pipeline_does_it(pipe: Any) -> None:
    expected = both(pipe)
    assert (expected[0].pooled is not None) == (pipe.name in ("SDXL", "SD3"))
    assert_close(encode_as(pipe, "prompt", TEXTS), expected[0])
    null = encode_as(pipe, "null", [""])
    assert len(null) == 1
    assert_close(null, expected[1][:1])


def test_a_space_stands_for_no_negative_prompt_where_that_means_no_guidance() -> None:
    pipe = pipelines.build("Qwen-Image").pipe
    assert_close(encode_as(pipe, "null", [""]), encode_as(pipe, "prompt", [" "]))
    prompts = encoded(pipe, [" ", "cat"])  # of two lengths
    space, cat = prompts.negative(torch.tensor([0, 1])).mean()
    torch.testing.assert_close(space, prompts.null.mean()[0])
    torch.testing.assert_close(space, encode_as(pipe, "null", [""]).mean()[0])
    assert not torch.allclose(space, cat)


def test_a_text_is_encoded_by_itself_where_its_padding_counts() -> None:
    pipe = pipelines.build("CogView4").pipe
    both, alone = (
        encode_as(pipe, "prompt", ["cat", "cat " * 20]),
        encode_as(pipe, "prompt", ["cat"]),
    )
    assert both.mask is not None
    assert both.mask.sum(1).tolist() == [16, 32]
    torch.testing.assert_close(both.embeds[:1, :16], alone.embeds)
    assert alone.mask is None


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_negative_prompts_are_encoded_as_the_pipeline_does_it(pipe: Any, cache_bytes: int) -> None:
    prompts, order = encoded(pipe, TEXTS, cache_bytes), torch.tensor([2, 0, 1])
    _, expected = both(pipe, negative_prompt=TEXTS)
    assert_close(prompts.negative(order), expected[order])
    assert_close(prompts.negative(torch.tensor([NULL])), encode_as(pipe, "null", [""]))
    same = torch.equal(prompts.negative(order).embeds, prompts(order).embeds)
    assert same == (pipe.name not in ("Sana", "Lumina2"))


def test_cached_or_encoded_on_demand_prompts_are_the_same(pipe: Any) -> None:
    table, encoder = encoded(pipe, TEXTS), encoded(pipe, TEXTS, cache_bytes=0)
    assert isinstance(table, PromptTable)
    assert isinstance(encoder, PromptEncoder)
    for index in ([2, 0, 2], [NULL, 1, NULL, 0], [NULL, NULL]):
        one, other = (prompts(torch.tensor(index)) for prompts in (table, encoder))
        assert len(one) == len(other) == len(index)
        assert_close(one, other)


def test_only_null_prompts_are_one(pipe: Any) -> None:
    prompts = encoded(pipe, TEXTS)
    assert len(some_or_one(prompts, torch.tensor([NULL] * 3))) == 1
    assert len(some_or_one(prompts, torch.tensor([NULL, 0, 1]))) == 3


def test_sdxl_is_given_the_sizes_that_its_pipeline_gives_it(pipe: Any) -> None:
    sizes = Backbone.of_pipeline(pipe).sizes(pipe)
    if pipe.name != "SDXL":
        assert sizes is None
        return
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    expected = pipe._get_add_time_ids(
        (side, side), (0, 0), (side, side), torch.float32,
        text_encoder_projection_dim=pipe.text_encoder_2.config.projection_dim,
    )  # fmt: skip
    assert torch.equal(sizes, expected)
