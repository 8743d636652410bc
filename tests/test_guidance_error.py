from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pilotfish import guidance_error as module
from pilotfish.guidance_error import GuidanceError, Sums, Trajectories, pipeline_guidance_error
from pilotfish.guides import ExternalGuide, Guide, TinyGuide
from pilotfish.interface import GuideError, GuideInputs
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.loading import use_deterministic_scheduler
from pilotfish.pipelines.sampling import sample
from pilotfish.teacher import Teacher

PROMPTS = ["cat", "a", "b"]
SHORT: dict[str, Any] = {"num_inference_steps": 2, "guidance_scales": (2.0, 4.0)}


@pytest.fixture
def guide(pipe: Any) -> Guide:
    return TinyGuide.for_denoiser(pipe.unet, "epsilon").eval()


@pytest.fixture
def moved(guide: Guide, randomise: Callable[[Guide], Guide]) -> Guide:
    return randomise(guide)


def measure(
    pipe: Any, guide: Guide, prompts: list[str] = PROMPTS, refresh: int = 0, **given: Any
) -> GuidanceError:
    return pipeline_guidance_error(
        pipe, guide, Trajectories.of_pipeline(pipe, prompts, **SHORT | given), refresh=refresh
    )


def test_a_fresh_guide_has_an_error_of_1(pipe: Any, guide: Guide) -> None:
    error = measure(pipe, guide)
    every = [error.mean, *error.by_w.values(), *error.by_time.values()]
    assert every == pytest.approx([1.0] * len(every), abs=1e-4)
    assert list(error.by_w) == ["2", "4"]
    assert list(error.by_time) == ["0.999", "0.499"]


def test_a_trained_guide_does_not(pipe: Any, moved: Guide) -> None:
    assert abs(measure(pipe, moved).mean - 1) > 0.01


def test_steps_with_both_passes_are_those_of_the_pipeline(
    pipe: Any, moved: Guide, randomise: Callable[[Guide], Guide]
) -> None:
    assert measure(pipe, moved, refresh=2).mean < 1e-8
    # after a first step with both passes the pipeline is on the trajectory of CFG
    fresh = ExternalGuide.for_denoiser(pipe.unet, "epsilon")
    use_deterministic_scheduler(pipe)
    guided, conditional, cfg = (
        torch.stack([
            s.latents
            for s in sample(pipe, PROMPTS, seeds=range(3), guidance_scale=4.0, guide=method,
                            num_inference_steps=2)
        ])
        for method in (Refreshed(moved, (0,)), Refreshed(fresh, (0,)), None)
    )  # fmt: skip
    noise = torch.stack(
        [torch.randn(cfg.shape[1:], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    )
    trajectories = Trajectories.of_pipeline(pipe, PROMPTS, **SHORT | {"guidance_scales": (4.0,)})
    trajectories.noise = noise
    error = pipeline_guidance_error(pipe, moved, trajectories, refresh=(0,))
    expected = (guided - cfg).square().sum() / (conditional - cfg).square().sum()
    assert error.by_time["0.499"] == pytest.approx(float(expected), rel=1e-3)
    assert error.by_time["0.999"] < 1e-8
    plain = pipeline_guidance_error(pipe, moved, trajectories)
    assert abs(plain.by_time["0.499"] - error.by_time["0.499"]) > 1e-3


def test_every_scale_counts_alike() -> None:
    error = GuidanceError.of({(2.0, 0.999): (0.0, 1.0, 1.0), (7.0, 0.999): (100.0, 100.0, 0.0)})
    assert error == GuidanceError(0.5, {"2": 0.0, "7": 1.0}, {"0.999": 0.5}, 0.5)


def test_a_scale_is_the_ratio_of_sums_over_its_times() -> None:
    error = GuidanceError.of({(4.0, 0.999): (3.0, 3.0, 0.0), (4.0, 0.499): (0.0, 1.0, 1.0)})
    assert error == GuidanceError(0.75, {"4": 0.75}, {"0.999": 1.0, "0.499": 0.0}, 0.5)


def test_the_cosine_is_that_of_what_is_added(pipe: Any, moved: Guide) -> None:
    error, halfway = measure(pipe, moved), (1.0, 4.0, 1.0)  # half the way in the right direction
    assert -1 <= error.cosine <= 1
    assert error.cosine != 0
    assert GuidanceError.of({(4.0, 0.5): halfway}).cosine == pytest.approx(1)
    assert GuidanceError.of({(4.0, 0.5): (9.0, 4.0, 1.0)}).cosine == pytest.approx(-1)


def test_it_depends_on_the_seed_and_not_on_batches(pipe: Any, moved: Guide) -> None:
    whole, again, parts, other = (
        measure(pipe, moved, batch_size=n, seed=s).mean for n, s in ((3, 5), (3, 5), (2, 5), (3, 6))
    )
    assert whole == again != other
    assert whole == pytest.approx(parts, rel=1e-4)


def test_progress_counts_the_batches_of_all_scales(pipe: Any, guide: Guide) -> None:
    trajectories = Trajectories.of_pipeline(pipe, PROMPTS, batch_size=2, **SHORT)
    calls: list[tuple[int, int]] = []
    pipeline_guidance_error(pipe, guide, trajectories, progress=lambda *at: calls.append(at))
    assert calls == [(i, 4) for i in range(5)]
    assert len([*trajectories]) == 4


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_prompts(pipe: Any, moved: Guide, count: int) -> None:
    sums: list[Sums] = []
    for index in range(count):
        trajectories = Trajectories.of_pipeline(pipe, PROMPTS, process=(index, count), **SHORT)
        # one after another: the last one sees the sums of all
        shared = pipeline_guidance_error(
            pipe, moved, trajectories, gather=lambda mine: sums.append(mine) or sums
        )
    assert shared.by_w == pytest.approx(measure(pipe, moved).by_w, rel=1e-5)


def test_a_guide_for_few_steps_is_given_the_slope_at_a_second_refresh(
    pipe: Any, randomise: Callable[[Guide], Guide]
) -> None:
    few = randomise(TinyGuide.for_denoiser(pipe.unet, "epsilon", rank=4, times=[0.999, 0.499]))
    seen: list[bool] = []

    def note(module: Any, args: Any) -> None:
        inputs: GuideInputs = args[0]
        if inputs.refresh is not None and torch.equal(inputs.refresh.time, inputs.time):
            seen.append(bool(inputs.refresh.slope.any()))

    # the pipeline's denoiser has the same precision, so the guide is not copied
    few.register_forward_pre_hook(note)
    measure(pipe, few, refresh=2, guidance_scales=(4.0,))
    assert seen == [False, True]


def test_trajectories_are_cached_for_further_guides(
    pipe: Any, guide: Guide, moved: Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [measure(pipe, g, batch_size=2) for g in (guide, moved)]
    kept = Trajectories.of_pipeline(pipe, PROMPTS, batch_size=2, cache=True, **SHORT)
    first = pipeline_guidance_error(pipe, guide, kept)
    monkeypatch.setattr(Teacher, "__call__", pytest.fail)
    assert [first, pipeline_guidance_error(pipe, moved, kept)] == alone


def test_negative_prompts_reach_teacher_and_student(pipe: Any, with_negative: Guide) -> None:
    texts = ["b", "", "cat"]  # the second has the null prompt
    negative = Trajectories.of_pipeline(pipe, PROMPTS, negative_prompts=texts, **SHORT)
    parts = Trajectories.of_pipeline(pipe, PROMPTS, negative_prompts=texts, batch_size=1, **SHORT)
    conditioned = pipeline_guidance_error(pipe, with_negative, negative)
    ignoring = pipeline_guidance_error(pipe, with_negative, negative, with_negative=False)
    in_parts = pipeline_guidance_error(pipe, with_negative, parts)
    assert in_parts.mean == pytest.approx(conditioned.mean, rel=1e-4)
    assert len({conditioned.mean, ignoring.mean, measure(pipe, with_negative).mean}) == 3


@pytest.fixture
def with_negative(pipe: Any, randomise: Callable[[Guide], Guide]) -> Guide:
    """A guide that is conditioned on negative prompts."""
    return randomise(TinyGuide.for_denoiser(pipe.unet, "epsilon", condition_on_negative=True))


def test_no_hook_stays_and_the_guide_keeps_its_precision(
    pipe: Any, moved: Guide, draw: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = draw(pipe)

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())

    hooks = count()
    measure(pipe, moved.double())
    assert moved.dtype == torch.float64
    assert count() == hooks
    monkeypatch.setattr(module, "_distance", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(pipe, moved)
    assert count() == hooks
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompts": []}, "at least one prompt"), ({"guidance_scales": (1.0, 2.0)}, "w above 1"),
     ({"guidance_scales": ()}, "w above 1"), ({"batch_size": 0}, "batch_size must be at least 1"),
     ({"negative_prompts": ["a"]}, "3 prompts but 1 negative prompts")],
)  # fmt: skip
def test_bad_input_is_refused(
    pipe: Any, guide: Guide, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(pipe, guide, **change)


def test_a_guide_for_another_denoiser_is_refused(pipe: Any, make_unet: Any) -> None:
    other = TinyGuide.for_denoiser(make_unet(block_out_channels=(8, 8)), "epsilon")
    with pytest.raises(GuideError, match="made for another denoiser"):
        measure(pipe, other)
