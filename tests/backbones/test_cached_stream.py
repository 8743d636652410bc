"""The negative prompts' stream of joined attention, whose tokens attend to each other alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pilotfish import TinyGuide
from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.cache import TABLE_BYTES
from pilotfish.interface import GuideOutput, TextConditions
from pilotfish.teacher import Student, checkpoint_in_pass
from tests import components
from tests.backbones.stubs import TIME, FixedGuide, equal_gains, guided, plain

IMAGE = {
    "qwen": 64, "z-image": 32, "lumina2": 16, "flux2": 64, "chroma": 64, "cogview4": 16,
    "aura-flow": 16,
}  # fmt: skip
"""The families, and the tokens of an image in their attention."""
SCHEDULE = torch.tensor([900.0, 500, 100])


@pytest.fixture(params=IMAGE)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_tokens(kind: str, text: TextConditions) -> int:
    """The tokens of one text in a family's attention to the image."""
    if kind == "z-image":  # padded
        return 32
    if kind == "lumina2" and text.mask is not None:  # without what pads it
        return int(text.mask.sum())
    return text.embeds.shape[1] + (8 if kind == "aura-flow" else 0)  # with registers


@contextmanager
def text_reads_itself(text: int, image: int, *, text_first: bool) -> Iterator[list[int]]:
    """Attention in which the image's tokens attend to all, the text's to each other alone.

    Args:
        text: the number of the text's tokens.
        image: that of the image's.
    """
    whole, calls = F.scaled_dot_product_attention, [0]
    part = slice(text) if text_first else slice(-text, None)

    def attention(
        query: Any, key: Any, value: Any, attn_mask: Any = None, **more: Any
    ) -> torch.Tensor:
        made = whole(query, key, value, attn_mask=attn_mask, **more)
        if query.shape[2] == text + image:
            calls[0] += 1
            if attn_mask is not None:
                rows = part if attn_mask.shape[2] > 1 else slice(None)
                attn_mask = attn_mask[:, :, rows, part]
            of_text = (x[:, :, part] for x in (query, key, value))
            made[:, :, part] = whole(*of_text, attn_mask=attn_mask, **more)
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", attention)
        yield calls


def unconditional(
    kind: str, denoiser: Any, latents: torch.Tensor, negatives: TextConditions, time: torch.Tensor
) -> torch.Tensor:
    """The predictions for negative prompts whose tokens attend to each other alone."""
    made, backbone = [], Backbone.of(denoiser)
    for i in range(len(latents)):
        one, text = slice(i, i + 1), negatives.expand(len(latents))[i : i + 1]
        tokens, first = text_tokens(kind, text), kind != "z-image"
        with text_reads_itself(tokens, IMAGE[kind], text_first=first) as calls:
            made.append(plain(denoiser, latents[one], text, time=time[one]))
        assert calls == [len(backbone.sites()["attention"])]
    return torch.cat(made)


def in_steps(
    denoiser: Any, guide: Any, latents: torch.Tensor, text: TextConditions,
    negative: TextConditions,
) -> torch.Tensor:  # fmt: skip
    """The predictions of one guided pass at all steps of a schedule."""
    backbone, place = Backbone.of(denoiser), 0
    hooks = backbone.install(guide)
    opened = GuidedPass(
        guide, lambda: 4.0, lambda: negative, hooks=hooks, timesteps=lambda: SCHEDULE,
        step=lambda: place,
    )  # fmt: skip
    made = []
    try:
        with torch.no_grad(), opened.open():
            for place, t in enumerate(SCHEDULE):  # noqa: B007
                made.append(backbone(latents, t.expand(len(latents)) / 1000, text))
    finally:
        hooks.remove()
    return torch.stack(made)


def without_mask(text: TextConditions) -> TextConditions:
    return TextConditions(text.embeds, text.pooled)


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("negatives", [1, 2])
def test_a_gain_of_minus_1_gives_the_prediction_for_a_text_that_reads_itself(
    kind: str, negatives: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a single call, and where the stream is made for a whole schedule at its first step, or
    would be too large and is made for each step."""
    family = components.FAMILIES[kind]
    if masked and not family.masked:
        return
    denoiser, latents = family.denoiser(), family.latents(2)
    text, negative = family.text(2), family.text(negatives, 5, seed=3)
    if not masked:
        text, negative = without_mask(text), without_mask(negative)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)), negative_stream="cached")
    close = {"atol": 1e-5, "rtol": 1e-4}
    expected = unconditional(kind, denoiser, latents, negative, TIME)
    made = guided(denoiser, guide, latents, text, negative)
    torch.testing.assert_close(made, expected, **close)
    assert not torch.allclose(made, plain(denoiser, latents, negative.expand(2)), atol=1e-4)
    times = (t.expand(2) / 1000 for t in SCHEDULE)
    steps = [unconditional(kind, denoiser, latents, negative, t) for t in times]
    for largest in (TABLE_BYTES, 0):
        monkeypatch.setattr("pilotfish.backbones.cache.TABLE_BYTES", largest)
        made = in_steps(denoiser, guide, latents, text, negative)
        torch.testing.assert_close(made, torch.stack(steps), **close)


@pytest.mark.parametrize("largest", [TABLE_BYTES, 0])
@pytest.mark.parametrize("stream", ["cached", "joint"])
def test_a_cached_stream_is_made_once_for_all_steps(
    kind: str, stream: str, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one negative prompt it has one row at each step, whatever the number of images; CogView4
    embeds the sizes of each image."""
    monkeypatch.setattr("pilotfish.backbones.cache.TABLE_BYTES", largest)
    family = components.FAMILIES[kind]
    denoiser, rows = family.denoiser(), list[int]()
    backbone = Backbone.of(denoiser)
    read = type(backbone).read  # type: ignore[attr-defined]

    def counted(self: Any, name: str, block: Any, x: torch.Tensor, embedding: Any) -> Any:
        assert len(embedding) == len(x)
        rows.append(len(x))
        return read(self, name, block, x, embedding)

    monkeypatch.setattr(type(backbone), "read", counted)
    gains = equal_gains(denoiser, 1.0)
    guide = FixedGuide(GuideOutput(gains=gains), negative_stream=stream)
    text = family.text(2)  # of Chroma's mask each call of its backbone makes another
    text = without_mask(text) if kind == "chroma" else text
    in_steps(denoiser, guide, family.latents(2), text, family.text(1, 5, seed=3))
    one, steps = 2 if kind == "cogview4" else 1, len(SCHEDULE)
    if stream == "joint":
        assert rows == [2] * len(gains) * steps
    elif largest:
        assert rows == [one * steps] * len(gains)
    else:
        assert rows == [one] * len(gains) * steps


@pytest.mark.parametrize("stream", ["cached", "joint"])
def test_a_layer_may_have_no_gain(kind: str, stream: str) -> None:
    """It is as with a gain of zero, and the stream runs through it."""
    family = components.FAMILIES[kind]
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    gains = equal_gains(denoiser, 1.0)
    some = dict(list(gains.items())[-1:])
    zeros = {name: gain * (name in some) for name, gain in gains.items()}
    made = [
        in_steps(
            denoiser, FixedGuide(GuideOutput(gains=given), negative_stream=stream), latents, text,
            family.text(1, 5, seed=3),
        )
        for given in (some, zeros)
    ]  # fmt: skip
    assert len(gains) > 1
    torch.testing.assert_close(*made)


def test_a_fresh_guide_with_a_cached_stream_changes_nothing(kind: str) -> None:
    family = components.FAMILIES[kind]
    for dtype in (torch.float32, torch.bfloat16):
        denoiser = family.denoiser().to(dtype)
        guide = TinyGuide.for_denoiser(denoiser, "flow", negative_stream="cached").eval().to(dtype)
        latents = family.latents(2).to(dtype)
        text, negative = family.text(2).to(dtype), family.text(1, 5, seed=7).to(dtype)
        time = TIME.to(dtype)
        made = guided(denoiser, guide, latents, text, negative, time=time)
        assert torch.equal(made, plain(denoiser, latents, text, time=time))
        for t, made in zip(
            SCHEDULE, in_steps(denoiser, guide, latents, text, negative), strict=True
        ):
            expected = plain(denoiser, latents, text, time=t.expand(2) / 1000)
            assert torch.equal(made, expected)


def test_an_image_of_another_size_in_the_same_pass(kind: str) -> None:
    """What is known of the negative prompt may depend on the image's size by its positions."""
    family = components.FAMILIES[kind]
    denoiser, text, negative = family.denoiser(), family.text(2), family.text(1, 5, seed=3)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, 1.0)), negative_stream="cached")
    backbone, time = Backbone.of(denoiser), SCHEDULE[:1].expand(2) / 1000
    sizes = [family.latents(2), family.latents(2)[..., :4]]

    def passed() -> GuidedPass:
        return GuidedPass(
            guide, lambda: 4.0, lambda: negative, timesteps=lambda: SCHEDULE, step=lambda: 0
        )

    backbone.install(guide)
    with torch.no_grad():
        with passed().open():
            together = [backbone(latents, time, text) for latents in sizes]
        for latents, made in zip(sizes, together, strict=True):
            with passed().open():
                torch.testing.assert_close(backbone(latents, time, text), made)


def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    family = components.FAMILIES[kind]
    denoiser = family.denoiser().requires_grad_(False)
    guide = TinyGuide.for_denoiser(denoiser, "flow", rank=4, negative_stream="cached")
    student = Student(components.randomise(guide), denoiser)
    given = (
        family.latents(2),
        TIME,
        family.text(2),
        family.text(1, 5, seed=7),
        torch.tensor([3.0, 7.5]),
    )

    def gradients() -> list[torch.Tensor | None]:
        student.zero_grad()
        student(*given).square().mean().backward()
        return [p.grad for p in student.parameters()]

    expected = gradients()
    assert any(g is not None and g.any() for g in expected)
    denoiser.enable_gradient_checkpointing(checkpoint_in_pass)
    denoiser.train()
    for found, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
