"""The operators that a guide adds to a pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.operators import (
    OperatorCounter,
    count_operators,
    count_shape,
    narrow_pipeline,
    operators_of,
)
from benchmarks.shapes import SHAPES, Shape
from benchmarks.step import SamplingStep
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideInputs, GuideOutput
from tests.benchmarks.small import SMALL, SMALL_SD3, SMALL_XL


class AddsText(Guide):
    """Adds to the text, and runs one operator of its own for it."""

    @register_to_config
    def __init__(
        self, signature: dict[str, Any], guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: list[float] | None = None, trained_on: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        return GuideOutput(text=self.scale * inputs.text.embeds)


def test_views_and_allocations_are_counted_apart() -> None:
    with OperatorCounter() as counter:
        x = torch.ones(4, 4)
        (x.t().reshape(-1) + x.view(-1)).sum()
    assert counter.operators == {"aten.ones.default": 1, "aten.clone.default": 1,
                                 "aten.add.Tensor": 1, "aten.sum.default": 1}  # fmt: skip
    assert counter.views["aten.t.default"] == 1


def test_a_step_adds_what_the_guide_runs() -> None:
    pipe = narrow_pipeline(SMALL)
    found = count_operators(pipe, AddsText.for_denoiser(pipe.unet, "epsilon"))
    assert found.by_operator["aten.mul.Tensor"] == found.by_operator["aten.add.Tensor"] == 1
    assert found.added == sum(found.by_operator.values()) <= 6
    assert found.share == found.added / found.plain


@pytest.mark.parametrize("shape", [SMALL, SMALL_XL])
def test_a_tiny_guide_adds_more_for_each_part(shape: Shape) -> None:
    pipe = narrow_pipeline(shape)
    small, large = (
        count_operators(pipe, TinyGuide.for_denoiser(pipe.unet, "epsilon", **parts).eval())
        for parts in ({"rank": 0, "head": 0}, {})
    )
    assert 0 < small.added < large.added < large.plain
    assert small.plain == large.plain


def test_a_narrow_pass_has_as_many_operators_as_a_full_one() -> None:
    """On fake tensors, which need no memory."""
    with FakeTensorMode(), torch.no_grad():
        step = SamplingStep(SHAPES["sd15"], torch.device("cpu"), torch.float32, {})
        with step.prepared("none", 1) as call, operators_of(step.denoiser) as full:
            call()
    pipe = narrow_pipeline(SHAPES["sd15"])
    guide = AddsText.for_denoiser(pipe.unet, "epsilon")
    assert count_operators(pipe, guide).plain == full.operators.total()


@pytest.mark.parametrize(("name", "limit"), [("sd15", 0.08), ("sd21", 0.08), ("sdxl", 0.08)])
def test_a_tiny_guide_adds_few_operators(name: str, limit: float) -> None:
    """A pass at batch 1 on a fast accelerator is bound by their number."""
    pipe = narrow_pipeline(SHAPES[name])
    guide = TinyGuide.for_denoiser(pipe.unet, SHAPES[name].prediction_type)
    assert count_operators(pipe, guide).share <= limit


def test_operators_of_transformers() -> None:
    """Cross-attention takes a few more; a negative stream beside joint attention takes a part of
    each block's."""
    wan, sd3 = (count_shape(SHAPES[n], TinyGuide.for_denoiser) for n in ("wan-1.3b", "sd35-medium"))
    assert wan.share <= 0.05
    assert wan.by_operator["aten.lerp.Tensor"] == 30
    assert 0.3 < sd3.share <= 0.55
    assert count_shape(SMALL_SD3, AddsText.for_denoiser).added <= 6
