"""Where a guide reads and adds in a UNet."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from pilotfish.backbones import (
    GuidedPass,
    decoder_layers,
    fingerprint,
    install,
    skip_channels,
    skip_levels,
)
from pilotfish.interface import GuideError, GuideInputs, GuideOutput, TextConditions

SHAPES = [
    {},
    {"block_out_channels": (8, 16, 16), "layers_per_block": 2},
    {"layers_per_block": (2, 1)},
    {"block_out_channels": (16,), "use_linear_projection": True},
]


class Stub:
    """A guide that answers as it was told and remembers what it was shown."""

    def __init__(self, unet: UNet2DConditionModel, injection: GuideOutput | None = None) -> None:
        self.config = SimpleNamespace(denoiser=fingerprint(unet, "epsilon"))
        self.dtype = torch.float32
        self.injection = injection
        self.seen: list[GuideInputs] = []

    guidance_scale_range = (1.0, 8.0)

    @property
    def touches(self) -> tuple[str, ...]:
        return tuple(self.injection.modules) if self.injection else ()

    @property
    def pushes(self) -> tuple[str, ...]:
        return tuple(self.injection.pushes) if self.injection else ()

    def __call__(self, inputs: GuideInputs) -> GuideOutput:
        self.seen.append(inputs)
        if self.injection is not None:
            return self.injection
        return GuideOutput()


def arguments(unet: UNet2DConditionModel, n: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(6)
    size = unet.config.sample_size
    z = torch.randn(n, unet.config.in_channels, size, size, generator=generator)
    t = torch.tensor([900, 100])[:n]
    states = torch.randn(n, 8, unet.config.cross_attention_dim, generator=generator)
    return z, t, states


Features = tuple[tuple[torch.Tensor, ...], torch.Tensor]


def encoder_injection(features: Any) -> GuideOutput:
    return GuideOutput(encoder=lambda skips, mid: features)


def random_features(unet: UNet2DConditionModel) -> Features:
    generator = torch.Generator().manual_seed(7)
    size, channels = unet.config.sample_size, skip_channels(unet.config)
    maps = [
        torch.randn(2, c, size >> level, size >> level, generator=generator)
        for c, level in zip(channels, skip_levels(unet.config), strict=True)
    ]
    return tuple(maps), torch.randn(maps[-1].shape, generator=generator)


def levels_of(config: dict[str, Any]) -> dict[str, Any]:
    depth = len(config.get("block_out_channels", (8, 16)))
    return config | {
        "down_block_types": ("CrossAttnDownBlock2D",) * depth,
        "up_block_types": ("CrossAttnUpBlock2D",) * depth,
    }


@pytest.fixture(params=range(len(SHAPES)))
def unet(request: pytest.FixtureRequest, make_unet: Callable[..., Any]) -> UNet2DConditionModel:
    return make_unet(**levels_of(SHAPES[request.param]))


@torch.no_grad()
def run(
    unet: Any, guide: Any, scale: Any, *arguments: Any, by: Any = None, **keywords: Any
) -> torch.Tensor:
    negative = TextConditions(torch.zeros(1, 8, 16))
    with GuidedPass(guide, lambda: scale, lambda: negative, hooks=by).open():
        return unet(*arguments, **keywords, return_dict=False)[0]


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_channels_and_levels_are_those_of_the_features(unet: UNet2DConditionModel) -> None:
    seen: list[Features] = []

    def remember(skips: tuple[torch.Tensor, ...], mid: torch.Tensor) -> Any:
        seen.append((skips, mid))
        return (None,) * len(skips), None

    guide = Stub(unet, GuideOutput(encoder=remember))
    install(guide, unet)
    run(unet, guide, 4.0, *arguments(unet))
    ((skips, mid),) = seen
    size = unet.config.sample_size
    shapes = [(f.shape[1], f.shape[2]) for f in skips]
    expected = zip(skip_channels(unet.config), skip_levels(unet.config), strict=True)
    assert shapes == [(c, size >> level) for c, level in expected]
    assert mid.shape == skips[-1].shape


def test_the_guide_adds_to_the_text(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    z, t, states = arguments(unet)
    guide = Stub(unet, GuideOutput(text=0.5 * states.flip(0)))
    install(guide, unet)
    with torch.no_grad():
        expected = unet(z, t, states + 0.5 * states.flip(0)).sample
    assert torch.equal(run(unet, guide, 4.0, z, t, states), expected)
    assert torch.equal(run(unet, guide, 4.0, z, t, encoder_hidden_states=states), expected)


def test_the_guide_adds_where_a_controlnet_adds(unet: UNet2DConditionModel) -> None:
    skips, mid = random_features(unet)
    guide = Stub(unet, encoder_injection((skips, mid)))
    install(guide, unet)
    guided = run(unet, guide, 4.0, *arguments(unet))
    with torch.no_grad():
        expected = unet(
            *arguments(unet),
            down_block_additional_residuals=skips,
            mid_block_additional_residual=mid,
        ).sample
        plain = unet(*arguments(unet)).sample
    assert torch.equal(guided, expected)
    assert not torch.allclose(guided, plain)


def test_a_controlnet_adds_beside_the_guide(unet: UNet2DConditionModel) -> None:
    skips, mid = random_features(unet)
    guide = Stub(unet, encoder_injection((skips, mid)))
    install(guide, unet)
    residuals = {
        "down_block_additional_residuals": tuple(0.5 * s for s in skips),
        "mid_block_additional_residual": 0.5 * mid,
    }
    both = run(unet, guide, 4.0, *arguments(unet), **residuals)
    with torch.no_grad():
        expected = unet(
            *arguments(unet),
            down_block_additional_residuals=tuple(1.5 * s for s in skips),
            mid_block_additional_residual=1.5 * mid,
        ).sample
    torch.testing.assert_close(both, expected)


def test_a_missing_skip_is_left_alone(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    skips, mid = random_features(unet)
    zeroed = encoder_injection(((skips[0], *(0 * s for s in skips[1:])), mid))
    absent = encoder_injection(((skips[0], *(None for _ in skips[1:])), mid))
    one, two = Stub(unet, zeroed), Stub(unet, absent)
    install(one, unet)
    install(two, unet)
    first, second = (run(unet, guide, 4.0, *arguments(unet)) for guide in (one, two))
    assert torch.equal(first, second)


def test_modules_are_added_to_as_they_run(unet: UNet2DConditionModel) -> None:
    made: list[int] = []
    layers = decoder_layers(unet.config)

    def addition(i: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def add(entered: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            made.append(x.shape[1])
            assert entered.shape[-2:] == x.shape[-2:]
            return torch.full_like(x, 0.01 * (i + 1))

        return add

    guide = Stub(unet, GuideOutput(modules={n: addition(i) for i, n in enumerate(layers)}))
    install(guide, unet)
    guided = run(unet, guide, 4.0, *arguments(unet))
    assert made == list(layers.values())
    assert layers == decoder_layers(guide.config.denoiser)

    def by_hand(module: nn.Module, args: Any, output: Any, i: int) -> Any:
        if isinstance(output, tuple):
            return (output[0] + 0.01 * (i + 1),)
        return output + 0.01 * (i + 1)

    for i, name in enumerate(layers):
        unet.get_submodule(name).register_forward_hook(lambda *a, i=i: by_hand(*a, i=i))
    with torch.no_grad():
        expected = unet(*arguments(unet)).sample
        torch.testing.assert_close(guided, expected)


def test_a_module_that_is_not_there_is_named(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    before = hooks_of(unet)
    guide = Stub(unet, GuideOutput(modules={"up_blocks.7.resnets.0": lambda x, y: y}))
    with pytest.raises(GuideError, match=r"no up_blocks\.7\.resnets\.0"):
        install(guide, unet)
    assert hooks_of(unet) == before


def test_the_output_is_added_to_last(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    seen: list[torch.Tensor] = []

    def double(features: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        seen.append(features)
        return prediction

    guide = Stub(unet, GuideOutput(modules={"conv_out": double}))
    install(guide, unet)
    with torch.no_grad():
        plain = unet(*arguments(unet)).sample
    assert torch.equal(run(unet, guide, 4.0, *arguments(unet)), 2 * plain)
    with torch.no_grad():
        assert torch.equal(unet.conv_out(seen[0]), plain)


def test_the_guide_is_told_of_the_call(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    guide = Stub(unet)
    install(guide, unet)
    z, t, states = arguments(unet)
    w = torch.tensor([2.5, 7.0])
    run(unet, guide, w, z, t, encoder_hidden_states=states)
    run(unet, guide, 3.5, sample=z, timestep=500, encoder_hidden_states=states)
    first, second = guide.seen
    assert torch.equal(first.latents, z)
    assert torch.equal(first.timestep, t)
    assert torch.equal(first.guidance_scale, w)
    assert torch.equal(first.encoder_hidden_states, states)
    assert first.negative_hidden_states.shape == states.shape
    assert second.timestep.tolist() == [500, 500]
    assert second.guidance_scale.tolist() == [3.5, 3.5]


def test_an_inpainting_denoiser_shows_only_its_latents(make_unet: Callable[..., Any]) -> None:
    unet = make_unet(in_channels=9)
    assert fingerprint(unet, "epsilon") == fingerprint(make_unet(), "epsilon")
    guide = Stub(unet)
    install(guide, unet)
    z, t, states = arguments(unet)
    run(unet, guide, 4.0, z, t, states)
    assert torch.equal(guide.seen[0].latents, z[:, :4])


@pytest.mark.parametrize("scale", [1.0, 0.5, 0, -3.0])
def test_a_scale_of_at_most_one_asks_no_guide(make_unet: Callable[..., Any], scale: float) -> None:
    unet = make_unet()
    guide = Stub(unet, encoder_injection(random_features(unet)))
    install(guide, unet)
    with torch.no_grad():
        plain = unet(*arguments(unet)).sample
    assert torch.equal(run(unet, guide, scale, *arguments(unet)), plain)
    assert not guide.seen


def test_hooks_do_nothing_outside_a_pass_of_their_guide(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    plain = unet(*arguments(unet)).sample
    guide, other = Stub(unet, encoder_injection(random_features(unet))), Stub(unet)
    install(guide, unet)
    assert torch.equal(unet(*arguments(unet)).sample, plain)
    assert torch.equal(run(unet, other, 4.0, *arguments(unet)), plain)
    assert not guide.seen
    assert not other.seen


def test_a_guide_installed_twice_acts_once(make_unet: Callable[..., Any]) -> None:
    """As when two pipelines share a denoiser and both carry the guide."""
    unet = make_unet()
    guide = Stub(unet, encoder_injection(random_features(unet)))
    first = install(guide, unet)
    once = run(unet, guide, 4.0, *arguments(unet))
    second = install(guide, unet)
    for hooks in (first, second):
        assert torch.equal(run(unet, guide, 4.0, *arguments(unet), by=hooks), once)
    assert len(guide.seen) == 3
    first.remove()
    assert torch.equal(run(unet, guide, 4.0, *arguments(unet), by=second), once)
    assert torch.equal(
        run(unet, guide, 4.0, *arguments(unet), by=first), run(unet, guide, 1.0, *arguments(unet))
    )


def test_removed_hooks_leave_no_trace(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    keys, before = list(unet.state_dict()), hooks_of(unet)
    hooks = install(Stub(unet), unet)
    assert hooks_of(unet) > before
    assert list(unet.state_dict()) == keys
    hooks.remove()
    assert hooks_of(unet) == before


def test_a_failed_call_leaves_nothing_behind(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    z, t, states = arguments(unet)
    plain = unet(z, t, states).sample
    guide = Stub(unet, encoder_injection(random_features(unet)))
    install(guide, unet)
    with pytest.raises(RuntimeError):
        run(unet, guide, 4.0, z, t, states[..., :3])
    assert torch.equal(unet(z, t, states).sample, plain)
    once = run(unet, guide, 4.0, z, t, states)
    assert torch.equal(run(unet, guide, 4.0, z, t, states), once)
