"""The contract that every kind of guide keeps: shapes, zeros, what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pilotfish.contract import GuideInputs, Injection
from pilotfish.denoisers import decoder_channels, skip_channels, skip_levels
from pilotfish.guides import ExternalGuide, FullGuide, Guide


@pytest.fixture
def inputs(unet: UNet2DConditionModel) -> GuideInputs:
    generator = torch.Generator().manual_seed(13)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    channels, levels = skip_channels(unet.config), skip_levels(unet.config)
    skips = tuple(
        randn(3, c, 8 >> level, 8 >> level) for c, level in zip(channels, levels, strict=True)
    )
    return GuideInputs(
        latents=randn(3, 4, 8, 8),
        timestep=torch.tensor([990, 500, 10]),
        guidance_scale=torch.tensor([2.0, 4.0, 7.5]),
        encoder_hidden_states=randn(3, 8, 16),
        negative_hidden_states=randn(3, 8, 16),
        skips=skips,
        mid=randn(*skips[-1].shape),
        added_cond_kwargs={},
    )


Maps = Callable[..., list[torch.Tensor]]


@pytest.fixture
def maps(unet: UNet2DConditionModel, inputs: GuideInputs) -> Maps:
    """Everything that an injection adds, where the decoder's layers made fixed random features."""
    generator = torch.Generator().manual_seed(14)
    channels = [*decoder_channels(unet.config), 8, 4]
    *layers, features, prediction = [torch.randn(3, c, 8, 8, generator=generator) for c in channels]

    def every(injection: Injection, samples: slice = slice(None)) -> list[torch.Tensor]:
        found = [m for m in (*injection.skips, injection.mid) if m is not None]
        found += [
            f(x[samples]) for f, x in zip(injection.layers, layers, strict=False) if f is not None
        ]
        if injection.output is not None:
            found.append(injection.output(features[samples], prediction[samples]))
        return found

    return every


def differ(maps: Maps, guide: Guide, inputs: GuideInputs, **changed: Any) -> bool:
    with torch.no_grad():
        pairs = zip(maps(guide(inputs)), maps(guide(replace(inputs, **changed))), strict=True)
        return any(not torch.allclose(a, b, atol=1e-7) for a, b in pairs)


def test_what_leaves_has_the_shape_of_what_it_is_added_to(
    trained: Guide, inputs: GuideInputs, unet: UNet2DConditionModel
) -> None:
    injection = trained(inputs)
    assert len(injection.skips) in (0, len(inputs.skips))
    assert injection.mid is None or injection.mid.shape == inputs.mid.shape
    for made, skip in zip(injection.skips, inputs.skips, strict=False):
        assert made is None or made.shape == skip.shape
    channels = decoder_channels(unet.config)
    assert len(injection.layers) in (0, len(channels))
    for addition, c in zip(injection.layers, channels, strict=False):
        x = torch.ones(3, c, 4, 4)
        assert addition is None or addition(x).shape == x.shape


def test_a_fresh_guide_answers_with_zeros(maps: Maps, fresh: Guide, inputs: GuideInputs) -> None:
    assert all((m == 0).all() for m in maps(fresh(inputs)))


def test_a_fresh_guide_can_learn(maps: Maps, fresh: Guide, inputs: GuideInputs) -> None:
    """The zeros must not stop the gradient of what makes them."""
    sum(m.sum() for m in maps(fresh(inputs))).backward()
    moved = [p for p in fresh.parameters() if p.grad is not None and (p.grad != 0).any()]
    assert moved


def test_scale_one_answers_with_zeros(maps: Maps, trained: Guide, inputs: GuideInputs) -> None:
    at_one = trained(replace(inputs, guidance_scale=torch.tensor([1.0, 0.3, 4.0])))
    for m in maps(at_one):
        assert (m[:2] == 0).all()
        assert (m[2] != 0).any()


@pytest.mark.parametrize("scale", [2.25, 2.5, 7.0])
def test_fractions_of_the_scale_count(
    maps: Maps, trained: Guide, inputs: GuideInputs, scale: float
) -> None:
    assert differ(maps, trained, inputs, guidance_scale=torch.full((3,), scale))


def test_timestep_and_text_count(maps: Maps, trained: Guide, inputs: GuideInputs) -> None:
    assert differ(maps, trained, inputs, timestep=inputs.timestep - 7)
    assert differ(
        maps, trained, inputs, encoder_hidden_states=inputs.encoder_hidden_states.roll(1, 0)
    )


def test_samples_do_not_mix(maps: Maps, trained: Guide, inputs: GuideInputs) -> None:
    def one(i: int) -> GuideInputs:
        part = {
            k: getattr(inputs, k)[i : i + 1]
            for k in ("latents", "timestep", "guidance_scale", "encoder_hidden_states",
                      "negative_hidden_states", "mid")
        }  # fmt: skip
        return replace(inputs, skips=tuple(s[i : i + 1] for s in inputs.skips), **part)

    with torch.no_grad():
        together = maps(trained(inputs))
        for i in range(3):
            for whole, alone in zip(together, maps(trained(one(i)), slice(i, i + 1)), strict=True):
                torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_every_parameter_has_a_part(maps: Maps, trained: Guide, inputs: GuideInputs) -> None:
    """A parameter without gradient would stop several processes from training together."""
    sum(m.pow(2).sum() for m in maps(trained(inputs))).backward()
    idle = [n for n, p in trained.named_parameters() if p.grad is None]
    assert not idle


def test_the_papers_plain_form_sees_nothing_of_the_base(
    maps: Maps, unet: UNet2DConditionModel, inputs: GuideInputs, randomise: Callable[[Guide], Guide]
) -> None:
    plain = randomise(ExternalGuide.for_denoiser(unet, "epsilon", reads=("latents",)))
    blind = {"skips": tuple(torch.zeros_like(s) for s in inputs.skips), "mid": 0 * inputs.mid}
    assert not differ(maps, plain, inputs, **blind)
    assert differ(maps, plain, inputs, latents=-inputs.latents)


def test_the_form_that_reads_skips_alone_sees_no_latents(
    maps: Maps, unet: UNet2DConditionModel, inputs: GuideInputs, randomise: Callable[[Guide], Guide]
) -> None:
    reader = randomise(ExternalGuide.for_denoiser(unet, "epsilon", reads=("skips",)))
    assert not differ(maps, reader, inputs, latents=-inputs.latents)
    assert differ(maps, reader, inputs, mid=-inputs.mid)


def test_the_full_guide_starts_from_the_encoder(unet: UNet2DConditionModel) -> None:
    guide = FullGuide.for_denoiser(unet, "epsilon")
    base = unet.state_dict()
    copied = {k: v for k, v in guide.encoder.state_dict().items() if k in base}
    assert any(k.startswith("down_blocks.1") for k in copied)
    assert all(torch.equal(v, base[k]) for k, v in copied.items())
    assert not any(k.startswith(("up_blocks", "conv_out")) for k in guide.encoder.state_dict())
    with torch.no_grad():
        guide.encoder.conv_in.weight.add_(1)
    assert not torch.equal(guide.encoder.conv_in.weight, unet.conv_in.weight)
