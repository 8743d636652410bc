"""Layers that take in the text, extrapolated away from the negative prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.interface import GuideError, GuideOutput, TextConditions
from pilotfish.teacher import checkpoint_in_pass
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

SIZES = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
POOLED = 12
POOLED_TEXT = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}  # fmt: skip
"""As SDXL has it."""
UNET_SHAPES: list[dict[str, Any]] = [
    {},
    {"layers_per_block": 2, "transformer_layers_per_block": 2},
    {"layers_per_block": (1, 2), "attention_head_dim": (2, 4), "use_linear_projection": True},
    {"reverse_transformer_layers_per_block": (3, 2)},
    {"mid_block_type": None},
]
UNET_TEXT: list[dict[str, Any]] = [
    {},
    {"addition_embed_type": None},
    {"resnet_time_scale_shift": "scale_shift"},
    {"resnet_skip_time_act": True},
    POOLED_TEXT,
]
TWO_THEN_ONE_SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("aura-flow", {}),
    ("aura-flow", {"num_mmdit_layers": 3, "num_single_dit_layers": 0, "patch_size": 1}),
    ("aura-flow", {"num_mmdit_layers": 0, "num_single_dit_layers": 1}),
    ("flux2", {}),
    ("flux2", {"num_layers": 3, "num_single_layers": 0}),
    ("flux2", {"num_layers": 0, "num_single_layers": 1, "mlp_ratio": 4.0}),
]
"""Blocks of two streams, then blocks of one."""
MASKED_SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("pixart", {}),
    ("pixart", {"num_layers": 3, "patch_size": 1}),
    ("ltx", {}),
    ("chroma", {}),
    ("chroma", {"num_layers": 1, "num_single_layers": 3}),
    ("cogview4", {}),
    ("cogview4", {"num_layers": 2, "patch_size": 1}),
    ("lumina2", {}),
    ("lumina2", {"num_layers": 2, "patch_size": 1, "num_kv_heads": 3, "num_refiner_layers": 2}),
    ("qwen", {}),
    ("qwen", {"num_layers": 1}),
    ("z-image", {}),
    ("z-image", {"n_layers": 2, "n_refiner_layers": 2, "qk_norm": False}),
    ("sana", {}),
    ("sana", {"num_layers": 3, "patch_size": 1, "qk_norm": None}),
]


def unet_text(denoiser: Any, n: int, length: int = 8, seed: int = 6) -> TextConditions:
    made = components.FAMILIES["unet"].text(n, length, seed)
    if denoiser.config.addition_embed_type != "text_time":
        return made
    generator = torch.Generator().manual_seed(seed + 1)
    return TextConditions(made.embeds, torch.randn(n, POOLED, generator=generator))


@pytest.mark.parametrize("config", UNET_SHAPES)
@pytest.mark.parametrize("text", UNET_TEXT)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_a_unet(
    config: dict[str, Any], text: dict[str, Any]
) -> None:
    # the encoder's attention layers are not extrapolated
    down = {"down_block_types": ("DownBlock2D",) * 2}
    unet = components.randomise(components.unet(**down, **config, **text))
    if not any(equal_gains(unet, -1.0)):
        return
    assert_negative_is_recovered(
        unet, unet_text(unet, 2), unet_text(unet, 1, length=5, seed=3), SIZES
    )


@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize(("name", "config"), TWO_THEN_ONE_SHAPES)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_two_streams_that_join(
    name: str, config: dict[str, Any], length: int
) -> None:
    family = components.FAMILIES[name]
    assert_negative_is_recovered(
        family.denoiser(**config), family.text(2), family.text(1, length, seed=3)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in components.FAMILIES if name != "unet"),
        *(("unet", config) for config in UNET_TEXT),
    ],
)
def test_a_gain_of_minus_1_holds_at_each_step_of_a_schedule(
    name: str, config: dict[str, Any]
) -> None:
    """Where what depends on time and negative prompt is computed for all steps at once; and of
    two denoisers in one pass each has its own."""
    family, down = components.FAMILIES[name], {"down_block_types": ("DownBlock2D",) * 2}
    config = config | (down if name == "unet" else {})
    denoisers = [components.randomise(family.denoiser(seed=seed, **config)) for seed in (0, 1)]
    text, negative = (
        unet_text(denoisers[0], n, length, seed) if name == "unet" else family.text(n, length, seed)
        for n, length, seed in ((2, 8, 6), (1, 5, 3))
    )
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoisers[0], -1.0)))
    timesteps = torch.tensor([900, 500, 100])
    guided_pass = GuidedPass(guide, lambda: 4.0, lambda: negative, timesteps=lambda: timesteps)

    def call(backbone: Backbone, t: torch.Tensor, given: TextConditions) -> torch.Tensor:
        backbone.timestep = lambda time: t.expand(2)  # type: ignore[method-assign]
        return backbone(family.latents(2), TIME, given, SIZES)

    for denoiser in denoisers:
        Backbone.of(denoiser).install(guide)
    with guided_pass.open():
        made = [call(Backbone.of(net), t, text) for t in timesteps for net in denoisers]
    both = negative[torch.tensor([0, 0])]
    expected = [call(Backbone.of(net), t, both) for t in timesteps for net in denoisers]
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize("config", [{}, {"num_layers": 3, "cross_attn_norm": False}])
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_a_video(
    config: dict[str, Any], length: int
) -> None:
    family = components.FAMILIES["wan"]
    assert_negative_is_recovered(
        family.denoiser(**config), family.text(2), family.text(1, length, seed=3)
    )


@pytest.mark.parametrize("masks", ["both", "prompt", "negative", "none"])
@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize(("name", "config"), MASKED_SHAPES)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_masked_text(
    name: str, config: dict[str, Any], length: int, masks: str
) -> None:
    family = components.FAMILIES[name]
    text, negative = family.text(2), family.text(1, length, seed=3)
    if masks in ("negative", "none"):
        text = TextConditions(text.embeds)
    if masks in ("prompt", "none"):
        negative = TextConditions(negative.embeds)
    assert_negative_is_recovered(family.denoiser(**config), text, negative)


def test_a_gain_of_minus_1_holds_with_a_lora_on_every_layer(family: components.Family) -> None:
    """The negative prompt passes the adapters as well."""
    down = (
        {"down_block_types": ("DownBlock2D",) * 2} if family is components.FAMILIES["unet"] else {}
    )
    denoiser = family.denoiser(**down)
    sites = Backbone.of(denoiser).sites()
    linear = [n for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=linear, init_lora_weights=False)
    inject_adapter_in_model(config, denoiser)
    assert Backbone.of(denoiser).sites() == sites
    assert_negative_is_recovered(denoiser, family.text(2), family.text(1, 5, seed=3))


def test_texts_of_one_length_are_compared_by_their_means_where_they_are_padded_on_the_left() -> (
    None
):
    """As in training, where other lengths bring a mask."""
    family = components.FAMILIES["cogview4"]
    denoiser, latents, embeds = family.denoiser(), family.latents(2), family.text(2).embeds
    guide = FixedGuide(GuideOutput(text_gain=torch.full((2, 1, 1), 0.5)))
    negative = TextConditions(family.text(1, seed=3).embeds)
    made = guided(denoiser, guide, latents, TextConditions(embeds), negative)
    means = embeds + 0.5 * (embeds - negative.embeds.mean(1, keepdim=True))
    torch.testing.assert_close(made, plain(denoiser, latents, TextConditions(means)))


def test_what_is_masked_does_not_count() -> None:
    family = components.FAMILIES["pixart"]
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, 0.5)))
    negative = family.text(1, seed=3)
    changed = TextConditions(negative.embeds.clone(), mask=negative.mask)
    changed.embeds[:, -1] = 9.0
    one, other = (guided(denoiser, guide, latents, text, n) for n in (negative, changed))
    torch.testing.assert_close(one, other)


def test_a_gain_of_0_changes_nothing_and_others_do(family: components.Family) -> None:
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    expected, negative = plain(denoiser, latents, text), family.text(1, 5, seed=3)
    for gain in (0.0, 0.5):
        guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, gain)))
        made = guided(denoiser, guide, latents, text, negative)
        assert torch.equal(made, expected) == (gain == 0)
    for name, gains in equal_gains(denoiser, 0.5).items():
        made = guided(
            denoiser, FixedGuide(GuideOutput(gains={name: gains})), latents, text, negative
        )
        assert not torch.allclose(made, expected, atol=1e-6), name


def test_a_layer_that_is_left_out_has_a_gain_of_0(family: components.Family) -> None:
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    negative, gains = family.text(1, 5, seed=3), equal_gains(denoiser, 0.5)
    for left_out in gains:
        zero = {**gains, left_out: 0 * gains[left_out]}
        others = {name: gain for name, gain in gains.items() if name != left_out}
        one, other = (
            guided(denoiser, FixedGuide(GuideOutput(gains=g)), latents, text, negative)
            for g in (zero, others)
        )
        torch.testing.assert_close(one, other)


def test_each_head_and_each_sample_has_a_gain_of_its_own(family: components.Family) -> None:
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    expected, negative = plain(denoiser, latents, text), family.text(2, seed=3)
    name, heads = Backbone.of(denoiser).sites()["attention"][0]
    made = []
    for head in range(heads):
        gains = torch.zeros(2, heads)
        gains[0, head] = 0.5
        guide = FixedGuide(GuideOutput(gains={name: gains}))
        made.append(guided(denoiser, guide, latents, text, negative))
        assert torch.equal(made[-1][1], expected[1])
        assert not torch.allclose(made[-1][0], expected[0])
    assert not torch.allclose(made[0], made[1])


def test_gradients_reach_the_gains_with_and_without_checkpointing(
    family: components.Family,
) -> None:
    found = []
    for checkpointing in (False, True):
        denoiser = family.denoiser().requires_grad_(False)
        if checkpointing:
            denoiser.train().enable_gradient_checkpointing(checkpoint_in_pass)
        gains = equal_gains(denoiser, 0.3)
        guide = FixedGuide(GuideOutput(gains={k: v.requires_grad_() for k, v in gains.items()}))
        backbone = Backbone.of(denoiser)
        backbone.install(guide)
        negative = family.text(1, 5, seed=3)
        with GuidedPass(guide, lambda: 4.0, lambda n=negative: n).open():
            made = backbone(family.latents(2), TIME, family.text(2))
        made.square().mean().backward()
        found.append([gain.grad for gain in gains.values()])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert one.any()
        torch.testing.assert_close(one, other)


# -- which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", UNET_SHAPES)
def test_every_cross_attention_layer_of_middle_and_decoder_is_found(
    config: dict[str, Any],
) -> None:
    """Also where the way up has more layers than the way down (SSD-1B)."""
    unet = components.unet(**config)
    there = [n for n, _ in unet.named_modules() if n.endswith("attn2") and "down" not in n]
    assert sorted(n for n, _ in Backbone.of(unet).sites()["attention"]) == sorted(there)
    if "reverse_transformer_layers_per_block" in config:
        assert len(there) == 1 + 2 * 3 + 2 * 2


@pytest.mark.parametrize("config", [*UNET_SHAPES, {"mid_block_type": "UNetMidBlock2D"}])
def test_pooled_text_enters_every_residual_layer(config: dict[str, Any]) -> None:
    unet = components.unet(**config)
    there = [n for n, m in unet.named_modules() if isinstance(m, ResnetBlock2D)]
    assert sorted(Backbone.of(unet).sites()["modulation"]) == sorted(there)
    for other in ({"addition_embed_type": None}, {"time_embedding_act_fn": "silu"}):
        without = components.unet(**config, **other)
        assert Backbone.of(without).sites()["modulation"] == []


def test_custom_diffusion_is_refused() -> None:
    unet = components.unet()
    name, _ = Backbone.of(unet).sites()["attention"][0]
    unet.get_submodule(name).processor.to_k_custom_diffusion = torch.nn.Identity()
    with pytest.raises(GuideError, match="Custom Diffusion"):
        Backbone.of(unet).install(FixedGuide(GuideOutput(gains=equal_gains(unet, 0.5))))
    assert count_hooks(unet) == 0


def test_fused_projections_work_or_are_noticed(family: components.Family) -> None:
    noticed = [components.FAMILIES[n] for n in ("sd3", "aura-flow", "chroma", "flux2")]
    sd3 = family is components.FAMILIES["sd3"]
    denoiser = family.denoiser(**({"dual_attention_layers": ()} if sd3 else {}))
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, 0.5)))
    given = family.latents(2), family.text(2), family.text(1, seed=3)
    expected = guided(denoiser, guide, *given)
    if not hasattr(denoiser, "fuse_qkv_projections"):
        return
    denoiser.fuse_qkv_projections()
    if family in noticed:
        with pytest.raises(GuideError, match=r"went past .*transformer_blocks\.0\.attn"):
            guided(denoiser, guide, *given)
    else:
        made = guided(denoiser, guide, *given)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
