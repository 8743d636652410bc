"""What a training step takes: computed without memory, and measured."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console
from tests.evaluation.test_shapes import SMALL, SMALL_XL

from benchmarks.shapes import SHAPES, Shape, ShapesResult, measure_shape
from benchmarks.training_memory import (
    TrainingStep,
    around_the_denoiser,
    computed_parts,
    counted_parts,
    training_memory,
)
from pilotfish.evaluation.table import training_table

HALF = torch.bfloat16


@pytest.mark.parametrize("config", [SMALL, SMALL_XL])
@pytest.mark.parametrize("guide", ["tiny", "full"])
def test_what_is_computed_without_memory_is_what_there_is(config: object, guide: str) -> None:
    shape = Shape(config)  # type: ignore[arg-type]
    parts = computed_parts(shape, guide, HALF, 2)
    assert parts == counted_parts(shape, guide, HALF, 2)
    assert parts["activations"] > 0
    step = TrainingStep(shape, guide, torch.device("cpu"), HALF, 2)
    step.gradients()
    sizes = [p.nbytes for p in step.steps.unet.parameters()]
    assert parts["denoiser"] == sum(sizes)
    assert all(p.dtype == HALF for p in step.steps.unet.parameters())
    grown = {p.dtype for p in step.guide.parameters()} | {
        p.grad.dtype for p in step.guide.parameters() if p.grad is not None
    }
    assert grown == {torch.float32}
    assert parts["moments"] == 2 * sum(p.nbytes for p in step.guide.parameters())


def test_checkpointing_and_half_precision_take_less() -> None:
    shape = Shape(SMALL | {"sample_size": 32})
    most = computed_parts(shape, "tiny", torch.float32, 4, checkpointing=False)
    less = computed_parts(shape, "tiny", torch.float32, 4)
    least = computed_parts(shape, "tiny", HALF, 4)
    assert less["activations"] < 0.8 * most["activations"]
    assert least["activations"] < less["activations"]  # the guide's own stay whole
    assert least["denoiser"] == less["denoiser"] / 2


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", 123_060_480), ("sd21", 340_387_840), ("sdxl", 817_720_320)]
)
def test_text_encoders_are_the_published_ones(name: str, published: int) -> None:
    around = around_the_denoiser(name, HALF)
    assert around == {"text encoders": 2 * published, "vae": 4 * 83_653_863}
    assert name in SHAPES


def test_a_real_step_updates_the_guide_and_is_shown() -> None:
    step = TrainingStep(Shape(SMALL), "tiny", torch.device("cpu"), HALF, 1)
    step.begin()
    before = [p.detach().clone() for p in step.guide.parameters()]
    step.step()
    after = list(step.guide.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    made = training_memory("sd15", Shape(SMALL), "tiny", command="it", measured=True)
    assert made.peak_bytes > 2**20
    assert made.seconds > 0
    counted = training_memory("sd15", Shape(SMALL), "full", command="it")
    assert math.isnan(counted.peak_bytes)
    shape = measure_shape(Shape(SMALL), command="it", batch_sizes=())
    shape.training.update(tiny=made, full=counted)
    result = ShapesResult({"small": shape})
    assert str(ShapesResult.from_json(result.to_json())) == str(result)
    console = Console(width=200, record=True)
    console.print(training_table(result))
    shown = console.export_text()
    assert "small, tiny" in shown
    assert "activations" in shown


def test_another_guide_is_refused() -> None:
    with pytest.raises(ValueError, match="tiny, full, not of agd"):
        training_memory("sd15", Shape(SMALL), "agd", command="it")
