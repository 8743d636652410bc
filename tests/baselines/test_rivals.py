"""Every rival that is a guide, on a real denoiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import baselines as rivals
from pilotfish.guides import Guide
from pilotfish.interface import GuideError, TextConditions
from pilotfish.teacher import Student

ALL: dict[str, type[Any]] = {name: getattr(rivals, name) for name in rivals.__all__}
KINDS = {name: kind for name, kind in ALL.items() if issubclass(kind, Guide)}
AT_ONE_SCALE = {"GuidanceLoRA", "TextSharpener"}


@pytest.fixture(params=sorted(KINDS))
def fresh(request: pytest.FixtureRequest, unet: UNet2DConditionModel) -> Guide:
    torch.manual_seed(2)
    return KINDS[request.param].for_denoiser(unet, "epsilon").eval()


@pytest.fixture
def trained(fresh: Guide, randomise: Callable[[Guide], Guide]) -> Guide:
    return randomise(fresh)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SCALE = torch.tensor([2.0, 4.0, 7.5])


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 8, 16, generator=generator)
    return z, torch.tensor([900, 500, 10]), text


def ask(student: Student, batch: Batch, w: torch.Tensor = SCALE) -> torch.Tensor:
    z, t, text = batch
    null = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(4))
    prediction: torch.Tensor = student(z, t, TextConditions(text), TextConditions(null), w)
    return prediction


def predict(
    guide: Guide, unet: UNet2DConditionModel, batch: Batch, w: torch.Tensor = SCALE
) -> torch.Tensor:
    student = Student(guide, unet)
    try:
        with torch.no_grad():
            return ask(student, batch, w)
    finally:
        student.hooks.remove()


def test_a_fresh_one_changes_nothing(
    fresh: Guide, unet: UNet2DConditionModel, batch: Batch
) -> None:
    with torch.no_grad():
        plain = unet(*batch).sample
    assert torch.equal(predict(fresh, unet, batch), plain)


def test_it_can_learn(fresh: Guide, unet: UNet2DConditionModel, batch: Batch) -> None:
    unet.requires_grad_(False)
    student = Student(fresh, unet)
    optimizer = torch.optim.Adam(fresh.parameters(), 2e-3)
    with torch.no_grad():
        plain = unet(*batch).sample
    for _ in range(20):
        (ask(student, batch) - 2 * plain).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    student.hooks.remove()
    error = (predict(fresh, unet, batch) - 2 * plain).square().mean()
    assert error < plain.square().mean()


def test_every_parameter_has_a_part(
    trained: Guide, unet: UNet2DConditionModel, batch: Batch
) -> None:
    student = Student(trained, unet)
    ask(student, batch).square().sum().backward()
    student.hooks.remove()
    assert not [n for n, p in trained.named_parameters() if p.grad is None]


def test_scale_text_and_fractions_count(
    trained: Guide, unet: UNet2DConditionModel, batch: Batch
) -> None:
    made = predict(trained, unet, batch)
    for other in (
        predict(trained, unet, batch, SCALE + 0.25),
        predict(trained, unet, (batch[0], batch[1], batch[2].roll(1, 0))),
    ):
        assert not torch.allclose(made, other, atol=1e-6)


def test_samples_do_not_mix(trained: Guide, unet: UNet2DConditionModel, batch: Batch) -> None:
    together = predict(trained, unet, batch)
    for i in range(3):
        one = slice(i, i + 1)
        alone = predict(trained, unet, tuple(x[one] for x in batch), SCALE[one])  # type: ignore[arg-type]
        torch.testing.assert_close(together[one], alone, atol=1e-4, rtol=1e-4)


def test_saved_and_loaded_it_is_the_same(
    trained: Guide, unet: UNet2DConditionModel, batch: Batch, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    again = Guide.from_pretrained(tmp_path)
    assert type(again) is type(trained)
    assert torch.equal(predict(trained, unet, batch), predict(again, unet, batch))


def test_on_a_pipeline_it_takes_one_pass_and_leaves_no_trace(
    make_pipe: Callable[[str], Any], fresh: Guide, randomise: Any, draw: Any, batches: Any
) -> None:
    pipe = make_pipe("epsilon")
    guide = randomise(type(fresh).for_denoiser(pipe.unet, "epsilon"))
    before = draw(pipe, ["cat", "dog"])
    with guide.attached(pipe), batches(pipe.unet) as sizes:
        guided = draw(pipe, ["cat", "dog"])
    assert sizes == [2, 2, 2]
    assert not torch.allclose(guided, before)
    assert torch.equal(draw(pipe, ["cat", "dog"]), before)


@pytest.mark.parametrize("name", sorted(AT_ONE_SCALE))
def test_those_of_one_scale_are_dials(
    unet: UNet2DConditionModel, batch: Batch, randomise: Callable[[Guide], Guide], name: str
) -> None:
    """At w = 1 the dial stands at 0, at the trained scale at 1; only their ratio counts."""
    with torch.no_grad():
        plain = unet(*batch).sample
    made = {}
    for scale in (3.0, 5.0):
        torch.manual_seed(2)
        guide = randomise(KINDS[name].for_denoiser(unet, "epsilon", trained_scale=scale))
        assert torch.equal(predict(guide, unet, batch, torch.ones(3)), plain)
        made[scale] = [
            predict(guide, unet, batch, torch.full((3,), 1 + dial * (scale - 1)))
            for dial in (0.5, 1.0)
        ]
    for one, other in zip(made[3.0], made[5.0], strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(*made[3.0])


@pytest.mark.parametrize("name", sorted(AT_ONE_SCALE))
def test_a_dial_needs_a_scale_above_one(unet: UNet2DConditionModel, name: str) -> None:
    with pytest.raises(GuideError, match="trained_scale must be above 1"):
        KINDS[name].for_denoiser(unet, "epsilon", trained_scale=1.0)
