"""CFG in some of the steps: nothing changes in the others, and passes are saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

from baselines import AdaptiveGuidance, GuidanceInterval, Rule
from pilotfish.evaluation.speed import counted_rows
from tests.pipelines import pipelines
from tests.pipelines.test_conditions import WIDTH, load_ip_adapter

STEPS = 6


@pytest.fixture
def pipe(make_pipe: Callable[[str], Any]) -> Any:
    return make_pipe("epsilon")


def draw(pipe: Any, w: float = 4.0, method: Rule | None = None) -> tuple[Any, int]:
    def call() -> torch.Tensor:
        latents: torch.Tensor = pipe(
            ["a cat", "dog"], guidance_scale=w, num_inference_steps=STEPS, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
        return latents

    if method is None:
        return call(), 0
    with method.attached(pipe), counted_rows(pipe.unet) as rows:
        made = call()
    return made, sum(rows)


def test_guidance_everywhere_is_cfg_bit_for_bit(pipe: Any) -> None:
    made, rows = draw(pipe, method=GuidanceInterval(0, 1000))
    assert torch.equal(made, draw(pipe)[0])
    assert rows == 2 * 2 * STEPS


def test_guidance_nowhere_is_the_conditional_model(pipe: Any) -> None:
    made, rows = draw(pipe, method=GuidanceInterval(1000, 1001))
    assert torch.allclose(made, draw(pipe, w=1.0)[0], atol=1e-5)
    assert rows == 2 * STEPS


def test_an_interval_saves_the_passes_outside_it(pipe: Any) -> None:
    made, rows = draw(pipe, method=GuidanceInterval(400, 700))
    assert 2 * STEPS < rows < 2 * 2 * STEPS
    assert not torch.allclose(made, draw(pipe)[0])


def test_adaptive_guidance_ends_where_the_predictions_agree(pipe: Any) -> None:
    at_once = AdaptiveGuidance(1e-6)  # random denoisers agree by half and more
    _, rows = draw(pipe, method=at_once)
    assert rows == 2 * 2 + 2 * (STEPS - 1)
    assert draw(pipe, method=at_once)[1] == rows, "the next call starts with guidance again"
    never, rows = draw(pipe, method=AdaptiveGuidance(1.0))
    assert torch.equal(never, draw(pipe)[0])


def test_nothing_is_left_behind(pipe: Any) -> None:
    before = draw(pipe)[0]
    draw(pipe, method=GuidanceInterval(400, 700))
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert torch.equal(draw(pipe)[0], before)


def test_a_timestep_that_runs_twice_does_not_reset(pipe: Any) -> None:
    """PNDM runs its second timestep twice."""
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    at_once = AdaptiveGuidance(1e-6)
    for _ in range(2):
        _, rows = draw(pipe, method=at_once)
        assert rows == 2 * 2 + 2 * STEPS  # one step more than num_inference_steps


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        AdaptiveGuidance(threshold)


def test_an_empty_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="no timestep"):
        GuidanceInterval(700, 400)


@pytest.mark.parametrize("name", ["SD ControlNet", "SDXL ControlNet", "SD", "SDXL"])
def test_guidance_nowhere_is_the_conditional_model_with_other_conditions(name: str) -> None:
    """ControlNet residuals come in tuples and IP-Adapter images in lists; both are halved."""
    model = pipelines.build(name)
    call: dict[str, Any] = {}
    if "ControlNet" not in name:
        load_ip_adapter(model)
        generator = torch.Generator().manual_seed(1)
        call["ip_adapter_image_embeds"] = [torch.randn(2, 1, WIDTH, generator=generator)]
    cfg = model.latents(**call)
    one = {k: [v[0].chunk(2)[1]] for k, v in call.items()}
    conditional = model.latents(guidance_scale=1.0, **one)
    with GuidanceInterval(-2, -1).attached(model.pipe):
        found = model.latents(**call)
    torch.testing.assert_close(found, conditional, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, cfg, atol=1e-2)
