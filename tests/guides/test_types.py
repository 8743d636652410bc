"""The contract that every kind of guide keeps: shapes, zeros, what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pilotfish.backbones import decoder_layers, skip_channels, skip_levels
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
from pilotfish.interface import GuideError, GuideInputs, GuideOutput


@pytest.fixture
def inputs() -> GuideInputs:
    generator = torch.Generator().manual_seed(13)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return GuideInputs(
        latents=randn(3, 4, 8, 8),
        timestep=torch.tensor([990, 500, 10]),
        guidance_scale=torch.tensor([2.0, 4.0, 7.5]),
        encoder_hidden_states=randn(3, 8, 16),
        negative_hidden_states=randn(3, 8, 16),
        added_cond_kwargs={},
    )


Maps = Callable[..., list[torch.Tensor]]


@dataclass(frozen=True)
class Made:
    """What a denoiser might make in a pass: random features in its shapes."""

    skips: tuple[torch.Tensor, ...]
    mid: torch.Tensor
    modules: dict[str, tuple[torch.Tensor, torch.Tensor]]  # what enters, what is made

    @classmethod
    def by(cls, unet: UNet2DConditionModel) -> Made:
        generator = torch.Generator().manual_seed(14)

        def maps(channels: list[int], levels: list[int]) -> tuple[torch.Tensor, ...]:
            return tuple(
                torch.randn(3, c, 8 >> level, 8 >> level, generator=generator)
                for c, level in zip(channels, levels, strict=True)
            )

        skips = maps(skip_channels(unet.config), skip_levels(unet.config))
        layers = decoder_layers(unet.config)
        modules = {name: maps([c, c], [0, 0]) for name, c in layers.items()}
        return cls(skips, skips[-1].flip(1), modules | {"conv_out": maps([8, 4], [0, 0])})


@pytest.fixture
def made(unet: UNet2DConditionModel) -> Made:
    return Made.by(unet)


@pytest.fixture
def maps(made: Made) -> Maps:
    """Everything that an injection adds."""

    def every(
        injection: GuideOutput, samples: slice = slice(None), made: Made = made
    ) -> list[torch.Tensor]:
        found: list[torch.Tensor | None] = [injection.text, *injection.pushes.values()]
        if injection.encoder is not None:
            skips = tuple(s[samples] for s in made.skips)
            of_skips, of_mid = injection.encoder(skips, made.mid[samples])
            found += [*of_skips, of_mid]
        for name, addition in injection.modules.items():
            found.append(addition(*(x[samples] for x in made.modules[name])))
        return [m for m in found if m is not None]

    return every


def differ(maps: Maps, guide: Guide, inputs: GuideInputs, **changed: Any) -> bool:
    with torch.no_grad():
        pairs = zip(maps(guide(inputs)), maps(guide(replace(inputs, **changed))), strict=True)
        return any(not torch.allclose(a, b, atol=1e-7) for a, b in pairs)


def test_what_leaves_has_the_shape_of_what_it_is_added_to(
    trained: Guide, inputs: GuideInputs, made: Made
) -> None:
    injection = trained(inputs)
    if injection.text is not None:
        assert injection.text.shape == inputs.encoder_hidden_states.shape
    if injection.encoder is not None:
        of_skips, of_mid = injection.encoder(made.skips, made.mid)
        assert [None if a is None else a.shape for a in of_skips] == [s.shape for s in made.skips]
        assert of_mid is None or of_mid.shape == made.mid.shape
    assert set(injection.pushes) == set(trained.pushes)
    for gain in injection.pushes.values():
        assert gain.shape in ((len(inputs.latents), 2), (len(inputs.latents), 1))
    assert set(injection.modules) == set(trained.touches)
    for name, addition in injection.modules.items():
        entered, made_there = made.modules[name]
        assert addition(entered, made_there).shape == made_there.shape


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
    per_sample = [f.name for f in fields(inputs) if f.name != "added_cond_kwargs"]
    with torch.no_grad():
        together = maps(trained(inputs))
        for i in range(3):
            only = slice(i, i + 1)
            alone = replace(inputs, **{k: getattr(inputs, k)[only] for k in per_sample})
            for whole, one in zip(together, maps(trained(alone), only), strict=True):
                torch.testing.assert_close(whole[only], one, atol=1e-5, rtol=1e-4)


def test_every_parameter_has_a_part(maps: Maps, trained: Guide, inputs: GuideInputs) -> None:
    """A parameter without gradient would stop several processes from training together."""
    sum(m.pow(2).sum() for m in maps(trained(inputs))).backward()
    idle = [n for n, p in trained.named_parameters() if p.grad is None]
    assert not idle


def test_the_papers_plain_form_sees_nothing_of_the_base(
    maps: Maps, unet: UNet2DConditionModel, inputs: GuideInputs, made: Made,
    randomise: Callable[[Guide], Guide],
) -> None:  # fmt: skip
    plain = randomise(ExternalGuide.for_denoiser(unet, "epsilon", reads=("latents",)))
    blind = replace(made, skips=tuple(0 * s for s in made.skips), mid=0 * made.mid)
    with torch.no_grad():
        pairs = zip(maps(plain(inputs)), maps(plain(inputs), made=blind), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert differ(maps, plain, inputs, latents=-inputs.latents)


def test_the_form_that_reads_skips_alone_sees_no_latents(
    maps: Maps, unet: UNet2DConditionModel, inputs: GuideInputs, made: Made,
    randomise: Callable[[Guide], Guide],
) -> None:  # fmt: skip
    reader = randomise(ExternalGuide.for_denoiser(unet, "epsilon", reads=("skips",)))
    assert not differ(maps, reader, inputs, latents=-inputs.latents)
    other = replace(made, mid=-made.mid)
    with torch.no_grad():
        pairs = zip(maps(reader(inputs)), maps(reader(inputs), made=other), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("part", "left"),
    [
        ({"push": False}, "layers output"),
        ({"rank": 0}, "text output"),
        ({"head": 0}, "text layers"),
    ],
)
def test_a_part_of_the_tiny_guide_can_be_left_out(
    unet: UNet2DConditionModel, inputs: GuideInputs, part: dict[str, Any], left: str
) -> None:
    injection = TinyGuide.for_denoiser(unet, "epsilon", **part)(inputs)
    made = {"text": injection.text is not None, "layers": any("up" in n for n in injection.modules),
            "output": "conv_out" in injection.modules}  # fmt: skip
    assert [name for name, there in made.items() if there] == left.split()


def test_a_tiny_guide_without_any_part_is_refused(unet: UNet2DConditionModel) -> None:
    nothing = {"push": False, "attention": False, "embedding": False, "rank": 0, "head": 0}
    with pytest.raises(GuideError, match="at least one of push, attention, embedding, rank"):
        TinyGuide.for_denoiser(unet, "epsilon", **nothing)


@pytest.mark.parametrize("without", [{"negative": False}, {"head": 0}])
def test_a_picture_without_what_it_needs_is_refused(
    unet: UNet2DConditionModel, without: dict[str, Any]
) -> None:
    whole = {"negative": True, "picture": 2}
    TinyGuide.for_denoiser(unet, "epsilon", **whole)
    with pytest.raises(GuideError, match="picture of the negative prompt needs"):
        TinyGuide.for_denoiser(unet, "epsilon", **whole | without)


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (16, 24)])
def test_the_picture_is_of_the_negative_prompt_and_stretched_to_the_latents(
    unet: UNet2DConditionModel, inputs: GuideInputs, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    guide = TinyGuide.for_denoiser(unet, "epsilon", negative=True, picture=2)
    torch.nn.init.normal_(guide.negative_picture.pictures.weight)
    torch.nn.init.normal_(guide.conditioning.negative.weight)
    # of the negative prompt itself, that is, and not by way of the embedding
    torch.nn.init.zeros_(guide.negative_picture.seen.weight)
    latents = torch.zeros(3, 4, *size)
    features, prediction = torch.zeros(3, 8, *size), torch.zeros(3, 4, *size)
    at = replace(inputs, latents=latents, guidance_scale=torch.tensor([2.0, 3.0, 3.0]))

    def added(**changed: Any) -> torch.Tensor:
        return guide(replace(at, **changed)).modules["conv_out"](features, prediction)

    one, swapped = added(), added(negative_hidden_states=inputs.negative_hidden_states.flip(0))
    assert one.shape == prediction.shape
    assert one.std((2, 3)).min() > 0
    assert not torch.allclose(one, swapped)
    picture = guide.negative_picture(guide.conditioning.told(at), guide.conditioning(at))
    strength = torch.tensor([[1.0], [2.0], [2.0]])  # w - 1, as in equation (1)
    if min(size) >= 8:  # stretched, the corners stay
        torch.testing.assert_close(one[..., 0, 0], strength * picture[..., 0, 0])
        torch.testing.assert_close(one[..., -1, -1], strength * picture[..., -1, -1])


@pytest.mark.parametrize("negative", [False, True])
def test_a_tiny_guide_may_look_at_the_negative_prompt_itself(
    unet: UNet2DConditionModel, inputs: GuideInputs, negative: bool
) -> None:
    """Prompt and negative prompt moved alike differ as before: only such a guide notices."""
    torch.manual_seed(0)
    guide = TinyGuide.for_denoiser(unet, "epsilon", negative=negative)
    moved = replace(
        inputs,
        encoder_hidden_states=inputs.encoder_hidden_states + 0.5,
        negative_hidden_states=inputs.negative_hidden_states + 0.5,
    )
    torch.testing.assert_close(guide.conditioning(moved), guide.conditioning(inputs))
    for parameter in guide.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    one, other = guide.conditioning(inputs), guide.conditioning(moved)
    assert torch.allclose(one, other, atol=1e-5) is not negative


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
