"""What a guide sees and adds to in a UNet, and what install leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
from pilotfish.interface import GuideError, GuideOutput, TextConditions
from tests import components
from tests.backbones.stubs import FixedGuide, count_hooks

SHAPES: list[dict[str, Any]] = [
    {},
    {"block_out_channels": (8, 16, 16), "layers_per_block": 2},
    {"layers_per_block": (2, 1)},
    {"block_out_channels": (16,), "use_linear_projection": True},
]
NEGATIVE = TextConditions(torch.zeros(1, 8, 16))
Features = tuple[tuple[torch.Tensor, ...], torch.Tensor]


def make_unet(**config: Any) -> UNet2DConditionModel:
    depth = len(config.get("block_out_channels", (8, 16)))
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",) * depth,
        "up_block_types": ("CrossAttnUpBlock2D",) * depth,
    }
    return components.unet(**blocks | config)


@pytest.fixture(params=SHAPES, ids=str)
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return make_unet(**request.param)


@pytest.fixture
def features(unet: UNet2DConditionModel) -> Features:
    """Something to add to each skip feature and to the mid block's output."""
    generator = torch.Generator().manual_seed(7)
    skips = [
        torch.randn(2, channels, 8 >> level, 8 >> level, generator=generator)
        for channels, level in Backbone.of(unet).sites()["encoder"]
    ]
    return tuple(skips), torch.randn(skips[-1].shape, generator=generator)


def arguments(channels: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(6)
    z = torch.randn(2, channels, 8, 8, generator=generator)
    return z, torch.tensor([900, 100]), torch.randn(2, 8, 16, generator=generator)


@torch.no_grad()
def run(
    unet: Any, guide: Any, *given: Any, scale: Any = 4.0, hooks: Any = None, **named: Any
) -> torch.Tensor:
    with GuidedPass(guide, lambda: scale, lambda: NEGATIVE, hooks=hooks).open():
        made: torch.Tensor = unet(*given, **named, return_dict=False)[0]
    return made


def installed(unet: UNet2DConditionModel, output: GuideOutput | None = None) -> FixedGuide:
    guide = FixedGuide(output)
    Backbone.of(unet).install(guide)
    return guide


# -- what a guide adds to ----------------------------------------------------------------------


def test_the_signature_lists_the_skip_features(
    unet: UNet2DConditionModel, features: Features
) -> None:
    skips, middle = features
    seen: dict[str, tuple[int, ...]] = {}
    unet.mid_block.register_forward_hook(lambda m, args, out: seen.update(mid=tuple(out.shape)))
    guide = installed(unet, GuideOutput(encoder=features))
    guided = run(unet, guide, *arguments())
    with torch.no_grad():
        expected = unet(
            *arguments(),
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
        ).sample
        unguided = unet(*arguments()).sample
    assert torch.equal(guided, expected)  # diffusers adds them one to one
    assert not torch.allclose(guided, unguided)
    assert seen["mid"] == tuple(middle.shape)
    assert Backbone.of(unet).sites()["middle"] == middle.shape[1]


def test_a_controlnet_adds_beside_the_guide(unet: UNet2DConditionModel, features: Features) -> None:
    skips, middle = features
    guide = installed(unet, GuideOutput(encoder=features))

    def residuals(factor: float) -> dict[str, Any]:
        return {
            "down_block_additional_residuals": tuple(factor * s for s in skips),
            "mid_block_additional_residual": factor * middle,
        }

    both = run(unet, guide, *arguments(), **residuals(0.5))
    with torch.no_grad():
        torch.testing.assert_close(both, unet(*arguments(), **residuals(1.5)).sample)


def test_residuals_are_added_as_the_layers_run(unet: UNet2DConditionModel) -> None:
    layers, ran = Backbone.of(unet).sites()["layers"], []

    def residual(i: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def add(entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
            ran.append(made.shape[1])
            assert entered.shape[-2:] == made.shape[-2:]
            return made + 0.01 * (i + 1)

        return add

    output = GuideOutput(residuals={name: residual(i) for i, (name, _) in enumerate(layers)})
    guided = run(unet, installed(unet, output), *arguments())
    assert ran == [channels for _, channels in layers]

    def by_hand(module: Any, args: Any, output: Any, i: int) -> Any:
        if isinstance(output, tuple):
            return (output[0] + 0.01 * (i + 1),)
        return output + 0.01 * (i + 1)

    for i, (name, _) in enumerate(layers):
        unet.get_submodule(name).register_forward_hook(lambda *a, i=i: by_hand(*a, i=i))
    with torch.no_grad():
        torch.testing.assert_close(guided, unet(*arguments()).sample)


def test_a_decoder_without_attention_has_fewer_layers() -> None:
    unet = components.unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    layers = Backbone.of(unet).sites()["layers"]
    assert [channels for _, channels in layers] == [16, 16, 8, 8, 8, 8]


def test_the_guide_adds_to_the_text() -> None:
    unet, (z, t, states) = make_unet(), arguments()
    guide = installed(unet, GuideOutput(text=0.5 * states.flip(0)))
    with torch.no_grad():
        expected = unet(z, t, states + 0.5 * states.flip(0)).sample
    assert torch.equal(run(unet, guide, z, t, states), expected)
    assert torch.equal(run(unet, guide, z, t, encoder_hidden_states=states), expected)


def test_the_text_is_extrapolated() -> None:
    unet, (z, t, states) = make_unet(), arguments()
    gain = torch.tensor([0.5, -1.0])[:, None, None]
    guide = installed(unet, GuideOutput(text_gain=gain))
    with torch.no_grad():
        expected = unet(z, t, states + gain * (states - NEGATIVE.embeds)).sample
    torch.testing.assert_close(run(unet, guide, z, t, states), expected)


def test_the_head_reads_the_last_features_and_changes_the_prediction() -> None:
    unet, seen = make_unet(), []

    def double(entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        seen.append(entered)
        return 2 * made

    guide = installed(unet, GuideOutput(residuals={"conv_out": double}))
    with torch.no_grad():
        plain = unet(*arguments()).sample
        assert torch.equal(run(unet, guide, *arguments()), 2 * plain)
        assert torch.equal(unet.conv_out(seen[0]), plain)


# -- what a guide is given ---------------------------------------------------------------------


def test_a_number_as_timestep_is_read() -> None:
    unet, (z, _, states) = make_unet(), arguments()
    guide = installed(unet)
    run(unet, guide, sample=z, timestep=500, encoder_hidden_states=states)
    (inputs,) = guide.inputs
    assert inputs.time.tolist() == [0.5, 0.5]
    assert torch.equal(inputs.latents, z)


def test_an_inpainting_unet_shows_its_latents_alone() -> None:
    unet = make_unet(in_channels=9)
    assert Backbone.of(unet).signature("epsilon") == Backbone.of(make_unet()).signature("epsilon")
    guide, (z, t, states) = installed(unet), arguments(9)
    run(unet, guide, z, t, states)
    assert torch.equal(guide.inputs[0].latents, z[:, :4])


# -- hooks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["up_blocks.7.resnets.0", "mid_block.attentions.4"])
@pytest.mark.parametrize("kind", ["residuals", "gains"])
def test_a_module_that_is_not_there_is_named_and_no_hook_stays(name: str, kind: str) -> None:
    unet = make_unet()
    guide = FixedGuide(GuideOutput(**{kind: {name: torch.ones(1)}}))
    with pytest.raises(GuideError, match=f"no {name}, to which the guide adds"):
        Backbone.of(unet).install(guide)
    assert count_hooks(unet) == 0


def test_hooks_serve_the_pass_of_their_own_guide_only() -> None:
    unet = make_unet()
    plain = run(unet, FixedGuide(), *arguments())
    guide = installed(unet, GuideOutput(residuals={"conv_out": lambda x, made: made + 1}))
    other = FixedGuide()
    assert torch.equal(run(unet, other, *arguments()), plain)
    assert not guide.inputs
    assert not other.inputs
    assert torch.equal(run(unet, guide, *arguments()), plain + 1)


def test_a_guide_that_is_installed_twice_acts_once() -> None:
    """As when two pipelines share a denoiser and both have the guide."""
    unet = make_unet()
    guide = FixedGuide(GuideOutput(residuals={"conv_out": lambda x, made: made + 1}))
    first = Backbone.of(unet).install(guide)
    once = run(unet, guide, *arguments())
    second = Backbone.of(unet).install(guide)
    for hooks in (first, second):
        assert torch.equal(run(unet, guide, *arguments(), hooks=hooks), once)
    assert len(guide.inputs) == 3
    first.remove()
    assert torch.equal(run(unet, guide, *arguments(), hooks=second), once)
    plain = run(unet, guide, *arguments(), scale=1.0)
    assert torch.equal(run(unet, guide, *arguments(), hooks=first), plain)


def test_a_failed_call_leaves_nothing_behind() -> None:
    unet, (z, t, states) = make_unet(), arguments()
    with torch.no_grad():
        plain = unet(z, t, states).sample
        guide = installed(unet, GuideOutput(residuals={"conv_out": lambda x, made: made + 1}))
        with pytest.raises(RuntimeError):
            run(unet, guide, z, t, states[..., :3])
        assert torch.equal(unet(z, t, states).sample, plain)
    assert torch.equal(run(unet, guide, z, t, states), plain + 1)


# -- the signature -----------------------------------------------------------------------------


def test_signatures_tell_unets_apart() -> None:
    def signature(prediction_type: str = "epsilon", **config: Any) -> dict[str, Any]:
        return Backbone.of(components.unet(**config)).signature(prediction_type)

    base = signature()
    assert base == signature(seed=1)
    others = [
        {"prediction_type": "v_prediction"}, {"block_out_channels": (8, 32)},
        {"layers_per_block": 2}, {"cross_attention_dim": 32}, {"addition_embed_type": None},
        {"attention_head_dim": 4}, {"mid_block_type": None},
    ]  # fmt: skip
    assert all(signature(**config) != base for config in others)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"attention_head_dim": 2}, {"attention_head_dim": [2, 2]}),
        ({"block_out_channels": (8, 16)}, {"block_out_channels": [8, 16]}),
        ({"layers_per_block": 1}, {"layers_per_block": [1, 1]}),
        ({"transformer_layers_per_block": 1}, {"transformer_layers_per_block": (1, 1)}),
        (
            {"cross_attention_dim": 16, "addition_embed_type": None},
            {"cross_attention_dim": [16, 16], "addition_embed_type": None},
        ),
        ({"only_cross_attention": False}, {"only_cross_attention": [False, False]}),
    ],
)
def test_signatures_of_one_shape_are_equal_however_it_is_written(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    guide = TinyGuide.for_denoiser(components.unet(**one), "epsilon")
    guide.check(Backbone.of(components.unet(**other)).signature("epsilon"))


def test_texts_of_several_widths_are_refused() -> None:
    unet = components.unet(cross_attention_dim=(16, 24), addition_embed_type=None)
    with pytest.raises(GuideError, match=r"several widths, \[16, 24\]"):
        Backbone.of(unet).signature("epsilon")


# -- unusual shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"mid_block_type": None},
        {"mid_block_type": None, "addition_embed_type": None},
        {"reverse_transformer_layers_per_block": (3, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("guide_class", [TinyGuide, ExternalGuide, FullGuide])
def test_guides_work_on_unusual_unets_or_refuse_them(
    config: dict[str, Any], guide_class: type[Guide]
) -> None:
    """Without mid block (tiny-sd), or with more layers on the way up (SSD-1B)."""
    unet = components.unet(**config)
    if guide_class is FullGuide and unet.mid_block is None:
        with pytest.raises(GuideError, match=r"encoder and mid block.* use the tiny guide"):
            guide_class.for_denoiser(unet, "epsilon")
        assert count_hooks(unet) == 0
        return
    guide = guide_class.for_denoiser(unet, "epsilon").eval()
    hooks = Backbone.of(unet).install(guide)
    with torch.no_grad():
        plain = unet(*arguments()).sample
    assert torch.equal(run(unet, guide, *arguments()), plain)
    assert not torch.allclose(run(unet, components.randomise(guide), *arguments()), plain)
    hooks.remove()
    assert count_hooks(unet) == 0
