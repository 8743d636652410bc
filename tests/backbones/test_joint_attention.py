"""Joint attention of Stable Diffusion 3, extrapolated away from the negative prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.cache import TABLE_BYTES
from pilotfish.backbones.joint_attention import JointBlock, exchange_text
from pilotfish.backbones.qwen_dit import QwenDiTBackbone
from pilotfish.interface import GuideError, GuideOutput, TextConditions
from tests import components
from tests.backbones.stubs import (
    TIME,
    FixedGuide,
    TextReadsItself,
    assert_negative_is_recovered,
    count_hooks,
    equal_gains,
    guided,
    plain,
)  # fmt: skip

SD3_SHAPES: list[dict[str, Any]] = [
    {},
    {"qk_norm": None},
    {"dual_attention_layers": ()},
    {"dual_attention_layers": (0, 1), "num_layers": 4, "patch_size": 1},
    {"num_layers": 1, "dual_attention_layers": ()},
]


@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize("config", SD3_SHAPES)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_sd3(
    config: dict[str, Any], length: int
) -> None:
    """In joint attention the negative text's stream runs beside the pass."""
    family = components.FAMILIES["sd3"]
    assert_negative_is_recovered(
        family.denoiser(**config), family.text(2), family.text(1, length, seed=3)
    )


@torch.no_grad()
def test_exchanging_the_text_of_an_answer_is_exact_with_all_tokens_and_near_with_some() -> None:
    """A second attention among the image's tokens gives the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 256, 16, generator=generator) for _ in range(3))
    text, negative = (
        [torch.randn(2, 3, length, 16, generator=generator) for _ in range(2)] for length in (7, 5)
    )

    def attention(text: list[torch.Tensor]) -> torch.Tensor:
        keys, values = (torch.cat(pair, 2) for pair in zip((k, v), text, strict=True))
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)

    answer, expected = attention(text), attention(negative)

    def error(image_tokens: int) -> float:
        made = exchange_text(answer, q, k, text, negative, image_tokens)
        return float((made - expected).norm() / (answer - expected).norm())

    assert error(256) < 1e-5
    assert error(64) < 0.25
    same = exchange_text(answer, q, k, text, text, 16)
    torch.testing.assert_close(same, answer)


@torch.no_grad()
@pytest.mark.parametrize("config", SD3_SHAPES)
def test_joint_attention_from_a_part_of_the_image_is_near_the_whole(config: dict[str, Any]) -> None:
    """The stream attends to all of the image, so that only the answer to the image is estimated;
    and an image of no more tokens is not sampled."""
    family = components.FAMILIES["sd3"]
    denoiser, text, negative = family.denoiser(**config), family.text(2), family.text(1, 5, seed=3)
    latents, gains = family.latents(2), equal_gains(denoiser, -1.0)
    tokens = latents[0, 0].numel() // denoiser.config.patch_size**2

    def make(joint_attention: str, image_tokens: int = 0) -> torch.Tensor:
        guide = FixedGuide(GuideOutput(gains=gains), joint_attention, image_tokens=image_tokens)
        return guided(denoiser, guide, latents, text, negative)

    whole = make("whole")
    assert torch.equal(make("sampled", tokens), whole)
    error = make("sampled", tokens // 2) - whole
    assert 0 < error.norm() < 0.2 * (plain(denoiser, latents, text) - whole).norm()


@torch.no_grad()
@pytest.mark.parametrize("largest", [TABLE_BYTES, 0])
@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("config", SD3_SHAPES)
def test_a_gain_of_minus_1_holds_with_a_cached_stream_where_text_reads_itself(
    config: dict[str, Any], negatives: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a single call, and where the stream is made for a whole schedule at its first step, or
    would be too large and is made for each step."""
    monkeypatch.setattr("pilotfish.backbones.cache.TABLE_BYTES", largest)
    family = components.FAMILIES["sd3"]
    denoiser, text = family.denoiser(**config), family.text(2)
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(TextReadsItself())
    negative, latents = family.text(negatives, 5, seed=3), family.latents(2)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)), negative_stream="cached")
    both = negative.expand(2)
    expected = plain(denoiser, latents, both)
    made = guided(denoiser, guide, latents, text, negative)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
    timesteps = torch.tensor([900.0, 500, 100])

    def call(t: torch.Tensor, given: TextConditions) -> torch.Tensor:
        found: torch.Tensor = denoiser(
            latents, given.embeds, given.pooled, t.expand(2), return_dict=False
        )[0]
        return found

    expected = torch.stack([call(t, both) for t in timesteps])
    hooks = Backbone.of(denoiser).install(guide)
    guided_pass = GuidedPass(guide, lambda: 4.0, lambda: negative, timesteps=lambda: timesteps)
    with guided_pass.open():
        made = torch.stack([call(t, text) for t in timesteps])
    hooks.remove()
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_a_cached_stream_is_made_once_for_all_steps(
    monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    read, rows = JointBlock.read, list[int]()

    def counted(block: JointBlock, stream: torch.Tensor, embedding: torch.Tensor) -> Any:
        rows.append(len(stream))
        return read(block, stream, embedding)

    monkeypatch.setattr(JointBlock, "read", counted)
    family = components.FAMILIES["sd3"]
    denoiser, text, negative = family.denoiser(), family.text(2), family.text(1, 5, seed=3)
    gains = equal_gains(denoiser, 1.0)
    guide = FixedGuide(GuideOutput(gains=gains), negative_stream="cached" if cached else "joint")
    timesteps = torch.tensor([900.0, 500, 100])
    Backbone.of(denoiser).install(guide)
    with GuidedPass(guide, lambda: 4.0, lambda: negative, timesteps=lambda: timesteps).open():
        for t in timesteps:
            denoiser(family.latents(2), text.embeds, text.pooled, t.expand(2))
    blocks = len(denoiser.transformer_blocks)
    assert rows == ([len(timesteps)] * blocks if cached else [2] * len(timesteps) * blocks)


@pytest.mark.parametrize("form", [{"joint_attention": "sampled"}, {"negative_stream": "cached"}])
def test_a_form_is_refused_where_it_is_not_implemented(
    form: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QwenDiTBackbone, "negative_stream_forms", ("joint",))
    guide = FixedGuide(**form)
    denoiser = components.FAMILIES["qwen"].denoiser()
    with pytest.raises(GuideError, match="not implemented for QwenImageTransformer2DModel"):
        Backbone.of(denoiser).install(guide)
    assert count_hooks(denoiser) == 0


@torch.no_grad()
def test_a_controlnet_of_sd3_adds_to_both() -> None:
    """And a block that is skipped, which no gain reaches, is reported."""
    family = components.FAMILIES["sd3"]
    denoiser, negative = family.denoiser(), family.text(1, 5, seed=3)
    residuals = [torch.randn(2, 16, 16) for _ in range(3)]

    def call(text: TextConditions, **more: Any) -> torch.Tensor:
        made: torch.Tensor = denoiser(
            family.latents(2), text.embeds, text.pooled, 1000 * TIME, residuals,
            return_dict=False, **more,
        )[0]  # fmt: skip
        return made

    expected = call(negative[torch.tensor([0, 0])])
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)))
    Backbone.of(denoiser).install(guide)
    with GuidedPass(guide, lambda: 4.0, lambda: negative).open():
        torch.testing.assert_close(call(family.text(2)), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(GuideError, match=r"went past transformer_blocks\.1\.attn"):
            call(family.text(2), skip_layers=[1])
