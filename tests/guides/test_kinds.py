"""The contract that every kind of guide keeps: shapes, zeros, what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pilotfish.contract import GuideInputs, Injection
from pilotfish.denoisers import skip_channels, skip_levels
from pilotfish.guides import FullGuide, Guide, TinyGuide


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


def maps(injection: Injection) -> list[torch.Tensor]:
    return [m for m in (*injection.skips, injection.mid) if m is not None]


def differ(guide: Guide, inputs: GuideInputs, **changed: Any) -> bool:
    with torch.no_grad():
        pairs = zip(maps(guide(inputs)), maps(guide(replace(inputs, **changed))), strict=True)
        return any(not torch.allclose(a, b, atol=1e-7) for a, b in pairs)


def test_what_leaves_has_the_shape_of_what_it_is_added_to(
    trained: Guide, inputs: GuideInputs
) -> None:
    injection = trained(inputs)
    assert len(injection.skips) == len(inputs.skips)
    assert injection.mid.shape == inputs.mid.shape
    for made, skip in zip(injection.skips, inputs.skips, strict=True):
        assert made is None or made.shape == skip.shape


def test_a_fresh_guide_answers_with_zeros(fresh: Guide, inputs: GuideInputs) -> None:
    assert all((m == 0).all() for m in maps(fresh(inputs)))


def test_a_fresh_guide_can_learn(fresh: Guide, inputs: GuideInputs) -> None:
    """The zeros must not stop the gradient of what makes them."""
    sum(m.sum() for m in maps(fresh(inputs))).backward()
    moved = [p for p in fresh.parameters() if p.grad is not None and (p.grad != 0).any()]
    assert moved


def test_scale_one_answers_with_zeros(trained: Guide, inputs: GuideInputs) -> None:
    at_one = trained(replace(inputs, guidance_scale=torch.tensor([1.0, 0.3, 4.0])))
    for m in maps(at_one):
        assert (m[:2] == 0).all()
        assert (m[2] != 0).any()


@pytest.mark.parametrize("scale", [2.25, 2.5, 7.0])
def test_fractions_of_the_scale_count(trained: Guide, inputs: GuideInputs, scale: float) -> None:
    assert differ(trained, inputs, guidance_scale=torch.full((3,), scale))


def test_timestep_and_text_count(trained: Guide, inputs: GuideInputs) -> None:
    assert differ(trained, inputs, timestep=inputs.timestep - 7)
    assert differ(trained, inputs, encoder_hidden_states=inputs.encoder_hidden_states.roll(1, 0))


def test_samples_do_not_mix(trained: Guide, inputs: GuideInputs) -> None:
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
            for whole, alone in zip(together, maps(trained(one(i))), strict=True):
                torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_every_parameter_has_a_part(trained: Guide, inputs: GuideInputs) -> None:
    """A parameter without gradient would stop several processes from training together."""
    sum(m.pow(2).sum() for m in maps(trained(inputs))).backward()
    idle = [n for n, p in trained.named_parameters() if p.grad is None]
    assert not idle


def test_the_plain_tiny_form_sees_nothing_of_the_base(
    unet: UNet2DConditionModel, inputs: GuideInputs, randomise: Callable[[Guide], Guide]
) -> None:
    plain = randomise(TinyGuide.for_denoiser(unet, "epsilon", reads=("latents",)))
    blind = {"skips": tuple(torch.zeros_like(s) for s in inputs.skips), "mid": 0 * inputs.mid}
    assert not differ(plain, inputs, **blind)
    assert differ(plain, inputs, latents=-inputs.latents)


def test_the_tiny_form_that_reads_skips_alone_sees_no_latents(
    unet: UNet2DConditionModel, inputs: GuideInputs, randomise: Callable[[Guide], Guide]
) -> None:
    reader = randomise(TinyGuide.for_denoiser(unet, "epsilon", reads=("skips",)))
    assert not differ(reader, inputs, latents=-inputs.latents)
    assert differ(reader, inputs, mid=-inputs.mid)


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
