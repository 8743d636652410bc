"""Both passes in some of the steps: CFG where it should be, and passes are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from baselines import (
    AdaptiveGuidance,
    CompressGuidance,
    DeltaReuse,
    GuidanceInterval,
    LinearAG,
    Rule,
)
from baselines.linear_ag import alternating, fit, gram_matrix
from baselines.reuse import denser_early, every_nth
from baselines.training_free import Step
from pilotfish.evaluation.speed import counted_rows
from pilotfish.refresh import DENSER, inside
from tests import components
from tests.pipelines import pipelines
from tests.pipelines.test_conditions import WIDTH, load_ip_adapter

STEPS = 6


@pytest.fixture
def pipe(make_pipe: Callable[[str], Any]) -> Any:
    return make_pipe("epsilon")


def draw(
    pipe: Any, w: float = 4.0, method: Rule | None = None, **given: Any
) -> tuple[Any, int]:  # fmt: skip
    def call() -> torch.Tensor:
        latents: torch.Tensor = pipe(
            ["a cat", "dog"], guidance_scale=w, num_inference_steps=STEPS, output_type="latent",
            generator=torch.Generator().manual_seed(0), **given,
        ).images  # fmt: skip
        return latents

    if method is None:
        return call(), 0
    with method.attached(pipe), counted_rows(pipe.unet) as rows:
        made = call()
    return made, sum(rows)


def test_rules_run_on_stable_diffusion_3_and_are_refused_elsewhere() -> None:
    call: dict[str, Any] = {
        "prompt": ["a cat", "dog"], "guidance_scale": 4.0, "num_inference_steps": 4,
        "output_type": "latent", "max_sequence_length": 4,
    }  # fmt: skip
    pipe = components.sd3_pipeline()

    def made() -> torch.Tensor:
        images: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        return images

    cfg = made()
    for rule, rows in ((GuidanceInterval(0, 1001), 16), (DeltaReuse(4), 16), (DeltaReuse(2), 12)):
        with rule.attached(pipe), counted_rows(pipe.transformer) as counted:
            assert torch.equal(made(), cfg) == (rows == 16)
        assert sum(counted) == rows
    assert torch.equal(made(), cfg)
    with pytest.raises(ValueError, match=r"delta reuse is made for .* is a PixArtSigma"):
        DeltaReuse(2).attached(components.pixart_pipeline()).__enter__()


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


# -- the last difference, and regression -------------------------------------------------

INNER = (inside, partial(inside, power=DENSER))
PLACES = (every_nth, *INNER, denser_early, partial(denser_early, power=5.0), alternating)


@given(st.integers(0, 60), st.integers(1, 50), st.sampled_from(PLACES))
def test_places_are_as_many_steps_as_wanted(count: int, steps: int, places: Any) -> None:
    found = places(count, steps)
    assert len(found) == min(count, steps)
    assert list(found) == sorted(set(found))
    assert set(found) <= set(range(steps))
    assert not found or found[0] == 0 or places in INNER, "the others begin with both passes"
    assert found[:1] != (0,) or places is not inside or count >= steps


def test_places_are_those_of_the_papers() -> None:
    assert every_nth(5, 25) == (0, 5, 10, 15, 20)
    assert inside(4, 25) == (5, 10, 15, 20)
    assert inside(4, 25, 2.0) == (1, 4, 9, 16)
    assert denser_early(5, 25, 1.0) == every_nth(5, 25)
    assert denser_early(5, 25, 2.0) == (0, 1, 4, 9, 16)
    assert alternating(7, 25) == (0, 2, 4, 6, 8, 10, 12), "in the first half every second step"
    assert alternating(5, 6) == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="power must be at least 1"):
        denser_early(5, 25, 0.5)


def fitted(pipe: Any, count: int, **given: Any) -> LinearAG:
    steps: dict[str, Any] = {"num_inference_steps": STEPS} | given
    gram = gram_matrix(pipe, ["a cat", "dog", "bee"], batch_size=2, **steps)
    return fit(gram, alternating(count, len(gram) // 2))


RULES_OF_COUNT: dict[str, Callable[[Any, int], Rule]] = {
    "delta reuse": lambda pipe, count: DeltaReuse(count),
    "delta reuse, inside": lambda pipe, count: DeltaReuse(
        count, lambda count, steps: tuple(range(steps))[-count:] if count else ()
    ),
    "delta reuse with slope": lambda pipe, count: DeltaReuse(count, slope=0.5),
    "Compress Guidance": lambda pipe, count: CompressGuidance(count),
    "LinearAG": fitted,
}


@pytest.fixture(params=sorted(RULES_OF_COUNT))
def make_rule(request: pytest.FixtureRequest) -> Callable[[Any, int], Rule]:
    return RULES_OF_COUNT[request.param]


def test_both_passes_everywhere_are_cfg_bit_for_bit(
    prompt_pipe: Any, make_rule: Callable[[Any, int], Rule]
) -> None:
    made, rows = draw(prompt_pipe, method=make_rule(prompt_pipe, STEPS))
    assert torch.equal(made, draw(prompt_pipe)[0])
    assert rows == 2 * 2 * STEPS


@pytest.fixture
def prompt_pipe(make_pipe: Callable[[str], Any], prediction_type: str) -> Any:
    """A pipeline of either prediction."""
    return make_pipe(prediction_type)


@pytest.mark.parametrize("count", range(STEPS + 1))
def test_each_second_pass_costs_one(
    pipe: Any, make_rule: Callable[[Any, int], Rule], count: int
) -> None:
    rule = make_rule(pipe, count)
    made, rows = draw(pipe, method=rule)
    assert rows == 2 * (STEPS + count)
    again, rows = draw(pipe, method=rule)
    assert torch.equal(again, made), "nothing is kept from call to call"
    assert rows == 2 * (STEPS + count)


@pytest.mark.parametrize("rule", [DeltaReuse(0), CompressGuidance(0)])
def test_no_second_pass_is_the_conditional_model(pipe: Any, rule: Rule) -> None:
    made, _ = draw(pipe, method=rule)
    assert torch.allclose(made, draw(pipe, w=1.0)[0], atol=1e-5)


def test_the_second_passes_of_heun_are_counted_by_its_calls(
    pipe: Any, make_rule: Callable[[Any, int], Rule]
) -> None:
    """Heun calls the denoiser twice a step, with every timestep but the first one twice."""
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    cfg = draw(pipe)[0]
    calls = len(pipe.scheduler.timesteps)
    assert calls == 2 * STEPS - 1
    for count in (0, 3, calls):
        made, rows = draw(pipe, method=make_rule(pipe, count))
        assert rows == 2 * (calls + count)
    assert torch.equal(made, cfg)


def test_negative_prompts_take_part(pipe: Any, make_rule: Callable[[Any, int], Rule]) -> None:
    rule, negative = make_rule(pipe, STEPS), {"negative_prompt": ["bee", "a hat"]}
    assert torch.equal(draw(pipe, method=rule, **negative)[0], draw(pipe, **negative)[0])
    some = make_rule(pipe, 2)
    assert not torch.equal(draw(pipe, method=some, **negative)[0], draw(pipe, method=some)[0])


def run(
    rule: Rule, unconditional: Iterable[torch.Tensor], conditional: Iterable[torch.Tensor]
) -> list[torch.Tensor]:
    """The unconditional predictions that a rule returns in one call with these predictions."""
    pairs, made = list(zip(unconditional, conditional, strict=True)), []
    rule.reset()
    for i, (u, c) in enumerate(pairs):
        both = rule.is_guided(Step(i, len(pairs), 999.0 - i))
        made.append(rule.after_both(u, c) if both else rule.after_one(c))
    return made


def predictions(steps: int, seed: int = 0) -> torch.Tensor:
    """(steps, 2, 4, 3, 3)"""
    return torch.randn(steps, 2, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 9))
def test_with_a_constant_difference_delta_reuse_is_cfg(count: int, steps: int) -> None:
    conditional, delta = predictions(steps), predictions(1, seed=1)[0]
    truth = conditional - delta
    torch.testing.assert_close(torch.stack(run(DeltaReuse(count), truth, conditional)), truth)


@given(st.integers(1, 9), st.integers(1, 9))
def test_compress_guidance_adds_a_constant_difference_as_often_as_cfg(
    count: int, steps: int
) -> None:
    """Its whole guidance is that of CFG, in fewer pieces."""
    conditional, delta = predictions(steps), predictions(1, seed=1)[0]
    made = torch.stack(run(CompressGuidance(count), conditional - delta, conditional))
    torch.testing.assert_close((conditional - made).sum(0), steps * delta, atol=1e-5, rtol=1e-5)
    assert int((conditional - made).flatten(1).any(1).sum()) == min(count, steps)


@given(st.integers(2, 9), st.integers(2, 9))
def test_with_a_difference_that_changes_evenly_its_slope_gives_cfg(count: int, steps: int) -> None:
    conditional, (delta, change) = predictions(steps), predictions(2, seed=1)
    deltas = delta + torch.arange(steps)[:, None, None, None, None] * change
    made = torch.stack(run(DeltaReuse(count, slope=1.0), conditional - deltas, conditional))
    second = every_nth(count, steps)[1]
    torch.testing.assert_close(made[second:], (conditional - deltas)[second:], atol=1e-4, rtol=1e-4)


def test_delta_reuse_is_unguided_before_its_first_second_pass() -> None:
    conditional, unconditional = predictions(4), predictions(4, seed=1)
    rule = DeltaReuse(1, places=lambda count, steps: (2,))
    made = run(rule, unconditional, conditional)
    assert all(torch.equal(made[i], conditional[i]) for i in (0, 1))
    torch.testing.assert_close(conditional[3] - made[3], (conditional - unconditional)[2])


@pytest.mark.parametrize("at", [(0,), (0, 2, 4), (1, 3), ()])
def test_linear_ag_reproduces_a_linear_relation(at: tuple[int, ...]) -> None:
    """Each unconditional prediction is a linear function of what the rule knows by then."""
    steps, rows = 6, predictions(6, seed=2).flatten(1).double()
    weights = torch.randn(steps, 2 * steps, generator=torch.Generator().manual_seed(3)).double()
    unconditional = predictions(steps, seed=4).flatten(1).double()
    for i in set(range(steps)) - set(at):
        terms = [weights[i, j] * rows[j] for j in range(i + 1)]
        terms += [weights[i, steps + j] * unconditional[j] for j in at if j < i]
        unconditional[i] = torch.stack(terms).sum(0)
    both = torch.cat([rows, unconditional])
    rule = fit(both @ both.T, at)
    torch.testing.assert_close(torch.stack(run(rule, unconditional, rows)), unconditional)


def test_linear_ag_is_no_worse_than_delta_reuse_on_its_own_trajectories(pipe: Any) -> None:
    """The last difference is one of the linear functions."""
    rule = fitted(pipe, 2)
    gram = gram_matrix(pipe, ["a cat", "dog", "bee"], batch_size=2, num_inference_steps=STEPS)
    for i in set(range(STEPS)) - rule.at:
        last = max(j for j in rule.at if j < i)
        reuse = torch.zeros(2 * STEPS).double()
        reuse[i], reuse[last], reuse[STEPS + last] = 1, -1, 1
        linear = rule.coefficients[i].clone()
        reuse[STEPS + i], linear[STEPS + i] = -1, -1
        assert linear @ gram @ linear <= reuse @ gram @ reuse


def test_linear_ag_does_not_depend_on_the_batches_of_its_fit(pipe: Any) -> None:
    one, two = (
        gram_matrix(pipe, ["a cat", "dog", "bee"], batch_size=n, num_inference_steps=STEPS)
        for n in (1, 3)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_linear_ag_is_refused_for_other_steps(pipe: Any) -> None:
    with pytest.raises(ValueError, match=f"fitted for {STEPS - 1} steps, not for {STEPS}"):
        draw(pipe, method=fitted(pipe, 2, num_inference_steps=STEPS - 1))
    with pytest.raises(ValueError, match="at least one prompt"):
        gram_matrix(pipe, [])


@pytest.mark.parametrize("kind", [DeltaReuse, CompressGuidance])
def test_a_negative_count_is_refused(kind: type[Rule]) -> None:
    with pytest.raises(ValueError, match="at least 0, not -1"):
        kind(-1)


def test_places_of_image_to_image_are_counted_from_its_own_first_step() -> None:
    model = pipelines.build("SD img2img")
    rule = DeltaReuse(1)
    with rule.attached(model.pipe), counted_rows(model.denoiser) as rows:
        model.latents()
    assert len(rows) < len(model.pipe.scheduler.timesteps)
    assert rows == [4] + [2] * (len(rows) - 1)
