"""Joint attention of Stable Diffusion 3, extrapolated away from the negative prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import JointAttnProcessor2_0

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.cache import TABLE_BYTES
from pilotfish.backbones.extrapolation import split_heads
from pilotfish.backbones.joint_attention import JointBlock
from pilotfish.backbones.qwen_dit import QwenDiTBackbone
from pilotfish.interface import GuideError, GuideOutput, TextConditions
from tests import components
from tests.backbones.stubs import (
    TIME,
    FixedGuide,
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
@pytest.mark.parametrize("config", SD3_SHAPES)
def test_joint_attention_may_be_extrapolated_by_the_text_alone(config: dict[str, Any]) -> None:
    """Two equal texts change nothing; a layer adds g times the difference of the two answers."""
    family = components.FAMILIES["sd3"]
    denoiser, text = family.denoiser(**config), family.text(2)
    gains = {k: v for k, v in equal_gains(denoiser, 2.0).items() if k.endswith(".attn")}
    alone = FixedGuide(GuideOutput(gains=gains), "text")
    same, latents = family.text(1, seed=6), family.latents(2)
    both = same[torch.tensor([0, 0])]
    torch.testing.assert_close(
        guided(denoiser, alone, latents, both, same), plain(denoiser, latents, both)
    )
    # by hand for one layer, whose text is that of the prompt alone
    first = {"transformer_blocks.0.attn": gains["transformer_blocks.0.attn"]}
    negative, seen = family.text(1, 5, seed=3), {}
    layer = denoiser.transformer_blocks[0].attn

    def note(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, output)

    parts = {
        "q": layer.norm_q or layer.to_q, "k": layer.norm_added_k or layer.add_k_proj,
        "v": layer.add_v_proj,
    }  # fmt: skip
    handles = [module.register_forward_hook(note(name)) for name, module in parts.items()]
    out = layer.to_out[0].register_forward_pre_hook(lambda m, args: seen.setdefault("a", args[0]))
    plain(denoiser, latents, text)
    one, seen = dict(seen), {}
    plain(denoiser, latents, negative[torch.tensor([0, 0])])
    other, seen = dict(seen), {}
    guided(denoiser, FixedGuide(GuideOutput(gains=first), "text"), latents, text, negative)
    for handle in (*handles, out):
        handle.remove()

    def answer(found: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = (
            x if x.ndim == 4 else split_heads(x, layer.heads)
            for x in (one["q"], found["k"], found["v"])
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    expected = one["a"] + 2.0 * (answer(one) - answer(other))
    torch.testing.assert_close(seen["a"], expected, atol=1e-5, rtol=1e-4)


class TextReadsItself(JointAttnProcessor2_0):
    """Attention in which the image's tokens attend to all, the text's to each other alone."""

    def __call__(  # type: ignore[override]
        self, attn: Any, hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        made = super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)
        if encoder_hidden_states is None:
            return made
        q, k, v = (
            split_heads(projection(encoder_hidden_states), attn.heads)
            for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            q, k = attn.norm_added_q(q), attn.norm_added_k(k)
        own = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return made[0], made[1] if attn.context_pre_only else attn.to_add_out(own)


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


@pytest.mark.parametrize("form", [{"joint_attention": "text"}, {"negative_stream": "cached"}])
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
