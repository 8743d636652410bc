from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pilotfish.backbones import Backbone
from pilotfish.evaluation.results import Cost, GuideSize
from pilotfish.evaluation.speed import counted_rows, denoiser_flops, measure_cost
from pilotfish.guides import Guide

SMALL: dict[str, Any] = {"num_inference_steps": 2, "rounds": 1, "batch_sizes": (1,)}


@pytest.fixture
def spent(pipe: Any, guide: Guide) -> Cost:
    return measure_cost(pipe, guide, **SMALL)


def test_cfg_takes_two_passes_a_step_and_the_guide_one(spent: Cost) -> None:
    assert spent.passes == {"none": 2.0, "cfg": 4.0, "guided": 2.0}


def test_cfg_is_two_plain_passes_and_the_guide_little_more_than_one(spent: Cost) -> None:
    flops = spent.flops
    assert flops["none"] > 0
    assert flops["cfg"] == 2 * flops["none"]
    assert flops["none"] < flops["guided"] < flops["cfg"]


def test_a_refresh_is_a_pass_more(pipe: Any, guide: Guide, spent: Cost) -> None:
    found = measure_cost(pipe, guide, num_inference_steps=4, refresh=1, rounds=1, batch_sizes=(1,))
    assert found.passes == {"none": 4, "cfg": 8, "guided": 5}
    assert spent.flops["guided"] < found.flops["guided"] < 1.3 * spent.flops["guided"]


def test_the_count_of_operations_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """One convolution of known size, counted through the same door."""

    class UNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 8, 3, padding=1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    class Pipe:
        unet = UNet()

    monkeypatch.setattr(Backbone, "of_pipeline", lambda pipe: SimpleNamespace(denoiser=pipe.unet))
    x = torch.zeros(1, 4, 5, 5)
    flops = denoiser_flops(Pipe, lambda: (Pipe.unet(x), x.flatten(2) @ x.flatten(2).mT))
    assert flops == 2 * 4 * 8 * 9 * 25  # and the product outside the denoiser is not counted


def test_ratios_are_of_the_median_round(pipe: Any, guide: Guide) -> None:
    """A clock of one's own: rounds of none 1 s, CFG 2, 4 or 9 s, guided 1 s."""

    def readings() -> Iterator[float]:
        now = 0.0
        # 3 calls to count passes, 3 for operations, a warm round, 3 timed ones
        for length in [1.0] * 6 + [1, 50, 1] + [1, 2, 1] + [1, 9, 1] + [1, 4, 1]:
            yield now
            now += length
            yield now

    clock = readings()
    found = measure_cost(pipe, guide, num_inference_steps=1, rounds=3, batch_sizes=(2,),
                 clock=lambda: next(clock))  # fmt: skip
    assert found.cfg_over_guided == found.cfg_over_none == {"2": 4.0}
    assert found.seconds == {"2": {"none": 1.0, "cfg": 4.0, "guided": 1.0}}
    assert next(clock, None) is None


def test_the_pipeline_is_left_as_it_was(pipe: Any, guide: Guide) -> None:
    kind = type(pipe)
    measure_cost(pipe, guide, **SMALL)
    assert type(pipe) is kind
    assert not pipe.unet._forward_hooks


def test_rows_are_counted_whether_named_or_not() -> None:
    class Denoiser(torch.nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return sample

    denoiser = Denoiser()
    with counted_rows(denoiser) as rows:
        denoiser(torch.zeros(3, 1))
        denoiser(sample=torch.zeros(2, 1))
    denoiser(torch.zeros(5, 1))
    assert rows == [3, 2]


def test_the_share_is_of_the_denoisers_parameters(pipe: Any, guide: Guide) -> None:
    size = GuideSize.of(guide, pipe, "tiny")
    assert size.parameters == sum(p.numel() for p in guide.parameters())
    assert size.share * sum(p.numel() for p in pipe.unet.parameters()) == pytest.approx(
        size.parameters
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"guidance_scale": 1.0}, "w above 1"), ({"rounds": 0}, "at least one round"),
     ({"batch_sizes": ()}, "at least one round")],
)  # fmt: skip
def test_bad_input_is_named(pipe: Any, guide: Guide, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_cost(pipe, guide, **change)
