"""The trained baselines on a small denoiser, and a new one in one file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import baselines
from baselines.comparison.config import ComparisonConfig, titles
from pilotfish.guides import Guide
from pilotfish.interface import GuideError, TextConditions
from pilotfish.teacher import Student
from pilotfish.training.config import DistillConfig

TYPES: dict[str, type[Guide]] = {
    name: kind
    for name, kind in ((name, getattr(baselines, name)) for name in baselines.__all__)
    if isinstance(kind, type) and issubclass(kind, Guide)
}
SINGLE_SCALE = ("DICE", "GuidanceLoRA")
SCALE = torch.tensor([2.0, 4.0, 7.5])
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=sorted(TYPES))
def fresh(request: pytest.FixtureRequest, unet: UNet2DConditionModel) -> Guide:
    torch.manual_seed(2)
    return TYPES[request.param].for_denoiser(unet, "epsilon").eval()


@pytest.fixture
def trained(fresh: Guide, randomise: Callable[[Guide], Guide]) -> Guide:
    return randomise(fresh)


@pytest.fixture
def batch() -> Batch:
    """Latents, timesteps and text of three samples."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 8, 16, generator=generator)
    return z, torch.tensor([900, 500, 10]), text


def run(student: Student, batch: Batch, w: torch.Tensor = SCALE) -> torch.Tensor:
    z, t, text = batch
    null = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(4))
    prediction: torch.Tensor = student(z, t / 1000, TextConditions(text), TextConditions(null), w)
    return prediction


def predict(
    guide: Guide, unet: UNet2DConditionModel, batch: Batch, w: torch.Tensor = SCALE
) -> torch.Tensor:
    student = Student(guide, unet)
    try:
        with torch.no_grad():
            return run(student, batch, w)
    finally:
        student.hooks.remove()


def test_a_fresh_guide_changes_nothing(
    fresh: Guide, unet: UNet2DConditionModel, batch: Batch
) -> None:
    with torch.no_grad():
        plain = unet(*batch).sample
    assert torch.equal(predict(fresh, unet, batch), plain)


def test_it_learns(fresh: Guide, unet: UNet2DConditionModel, batch: Batch) -> None:
    unet.requires_grad_(False)
    student = Student(fresh, unet)
    optimizer = torch.optim.Adam(fresh.parameters(), 2e-3)
    with torch.no_grad():
        plain = unet(*batch).sample
    for _ in range(20):
        (run(student, batch) - 2 * plain).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    student.hooks.remove()
    error = (predict(fresh, unet, batch) - 2 * plain).square().mean()
    assert error < plain.square().mean()


def test_every_parameter_has_a_gradient(
    trained: Guide, unet: UNet2DConditionModel, batch: Batch
) -> None:
    student = Student(trained, unet)
    run(student, batch).square().sum().backward()
    student.hooks.remove()
    assert not [n for n, p in trained.named_parameters() if p.grad is None]


def test_scale_and_text_change_the_prediction_and_samples_do_not_mix(
    trained: Guide, unet: UNet2DConditionModel, batch: Batch
) -> None:
    together = predict(trained, unet, batch)
    other_scale = predict(trained, unet, batch, SCALE + 0.25)
    other_text = predict(trained, unet, (batch[0], batch[1], batch[2].roll(1, 0)))
    for other in (other_scale, other_text):
        assert not torch.allclose(together, other, atol=1e-6)
    for i in range(3):
        one = slice(i, i + 1)
        alone = predict(trained, unet, tuple(x[one] for x in batch), SCALE[one])  # type: ignore[arg-type]
        torch.testing.assert_close(together[one], alone, atol=1e-4, rtol=1e-4)


def test_saving_and_loading_keeps_the_prediction(
    trained: Guide, unet: UNet2DConditionModel, batch: Batch, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    again = Guide.from_pretrained(tmp_path)
    assert type(again) is type(trained)
    assert torch.equal(predict(trained, unet, batch), predict(again, unet, batch))


def test_on_a_pipeline_it_takes_one_pass_and_detaches(
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


@pytest.mark.parametrize("name", SINGLE_SCALE)
def test_a_single_trained_scale_is_scaled_to_any_other(
    unet: UNet2DConditionModel, batch: Batch, randomise: Callable[[Guide], Guide], name: str
) -> None:
    """Only (w - 1) / (trained_scale - 1) counts."""
    with torch.no_grad():
        plain = unet(*batch).sample
    made = {}
    for scale in (3.0, 5.0):
        torch.manual_seed(2)
        guide = randomise(TYPES[name].for_denoiser(unet, "epsilon", trained_scale=scale))
        assert torch.equal(predict(guide, unet, batch, torch.ones(3)), plain)
        made[scale] = [
            predict(guide, unet, batch, torch.full((3,), 1 + strength * (scale - 1)))
            for strength in (0.5, 1.0)
        ]
    for one, other in zip(made[3.0], made[5.0], strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(*made[3.0])


@pytest.mark.parametrize("name", SINGLE_SCALE)
def test_a_trained_scale_of_one_is_refused(unet: UNet2DConditionModel, name: str) -> None:
    with pytest.raises(GuideError, match="trained_scale must be above 1"):
        TYPES[name].for_denoiser(unet, "epsilon", trained_scale=1.0)


TOY = '''
    """A baseline of one number: the text is scaled."""

    from dataclasses import dataclass

    import torch
    from diffusers.configuration_utils import register_to_config

    from pilotfish.guidance import guidance_strength
    from pilotfish.guides.base import Guide
    from pilotfish.interface import GuideOutput


    @dataclass(frozen=True)
    class ToySettings:
        start: float = 0.0


    class Toy(Guide, guide_type="toy", settings=ToySettings):
        title = "Toy method"

        @register_to_config
        def __init__(
            self, signature, start=0.0, guidance_scale_range=(1.0, 8.0), times=None,
            trained_on=None, pilotfish_version="0.2.0",
        ):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.full((), start))

        def forward(self, inputs, modulations=None):
            strength = guidance_strength(inputs.guidance_scale)[:, None, None]
            return GuideOutput(text=self.gain * strength * inputs.text.embeds)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file of a new baseline, and the line that imports it."""
    (tmp_path / "toy_baseline.py").write_text(dedent(TOY).lstrip())
    monkeypatch.syspath_prepend(str(tmp_path))
    import_module("toy_baseline")
    yield "toy"
    del Guide.registry["toy"], sys.modules["toy_baseline"]


def test_a_new_baseline_is_one_file_and_one_import(
    toy: str, unet: UNet2DConditionModel, batch: Batch, tmp_path: Path
) -> None:
    """It can be trained, compared, saved and loaded."""
    config = DistillConfig(output=str(tmp_path), guide_type=toy, guide={"start": 0.5})
    assert config.guide.start == 0.5
    assert titles()[toy] == "Toy method"
    assert ComparisonConfig(methods=(toy,)).methods == (toy,)
    guide = Guide.registry[toy].for_denoiser(unet, "epsilon", start=0.5)
    guide.save_pretrained(tmp_path / "guide")
    again = Guide.from_pretrained(tmp_path / "guide")
    assert torch.equal(predict(guide, unet, batch), predict(again, unet, batch))
