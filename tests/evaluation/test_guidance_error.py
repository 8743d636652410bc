from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pilotfish.conditioning import NULL
from pilotfish.evaluation.guidance_error import ErrorMeter, Walks, guidance_error
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError
from pilotfish.pipelines.sampling import TeacherStep
from pilotfish.teacher import Teacher

PROMPTS = ["cat", "a", "b"]
SHORT = {"num_inference_steps": 2, "guidance_scales": (2.0, 4.0)}


def step(t: int, seed: int = 0) -> TeacherStep:
    generator = torch.Generator().manual_seed(seed)
    z, conditional, cfg = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3))
    times, negative = torch.tensor([t, t]), torch.full((2,), NULL)
    return TeacherStep(z, times, torch.arange(2), negative, conditional, cfg)


def test_a_fresh_guide_is_no_guide(pipe: Any, guide: Guide) -> None:
    error = guidance_error(pipe, guide, PROMPTS, **SHORT)
    every = [error.mean, *error.by_w.values(), *error.by_timestep.values()]
    assert every == pytest.approx([1.0] * len(every), abs=1e-4)
    assert list(error.by_w) == ["2", "4"]
    assert list(error.by_timestep) == ["999", "499"]


def test_a_guide_that_moved_is_not_at_1(pipe: Any, moved: Guide) -> None:
    assert abs(guidance_error(pipe, moved, PROMPTS, **SHORT).mean - 1) > 0.01


def test_a_perfect_answer_has_no_error() -> None:
    meter, state = ErrorMeter(), step(999)
    meter.update(2.0, state, state.cfg)
    assert meter.compute().mean == 0


def test_every_scale_counts_alike_however_large_its_distances() -> None:
    meter, state = ErrorMeter(), step(999)
    far = TeacherStep(state.latents, state.timestep, state.prompt, state.negative,
                      10 * state.conditional, 10 * state.cfg)  # fmt: skip
    meter.update(2.0, state, state.cfg)
    meter.update(7.0, far, far.conditional)
    error = meter.compute()
    assert error.by_w == {"2": 0.0, "7": 1.0}
    assert error.mean == 0.5
    assert error.by_timestep == {"999": 0.5}


def test_a_scale_is_the_ratio_of_sums_over_its_timesteps() -> None:
    meter, early, late = ErrorMeter(), step(999, 1), step(499, 2)
    meter.update(4.0, early, early.conditional)
    meter.update(4.0, late, late.cfg)
    whole = [float((s.conditional - s.cfg).square().sum()) for s in (early, late)]
    error = meter.compute()
    assert error.mean == pytest.approx(whole[0] / sum(whole), rel=1e-5)
    assert error.by_timestep == {"999": pytest.approx(1), "499": 0}


def test_batches_make_no_difference(pipe: Any, moved: Guide) -> None:
    whole, parts = (
        guidance_error(pipe, moved, PROMPTS, batch_size=n, **SHORT).mean for n in (3, 2)
    )
    assert whole == pytest.approx(parts, rel=1e-4)


def test_it_repeats_by_seed(pipe: Any, moved: Guide) -> None:
    one, two, other = (
        guidance_error(pipe, moved, PROMPTS, seed=s, **SHORT).mean for s in (5, 5, 6)
    )
    assert one == two != other


def test_the_teacher_walks_once_for_several_guides(
    pipe: Any, guide: Guide, moved: Guide, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: Walks = {}
    alone = [guidance_error(pipe, g, PROMPTS, batch_size=2, **SHORT) for g in (guide, moved)]
    first = guidance_error(pipe, guide, PROMPTS, batch_size=2, known=known, **SHORT)
    assert len(known) == 4  # two scales, two batches
    monkeypatch.setattr(Teacher, "__call__", pytest.fail)
    second = guidance_error(pipe, moved, PROMPTS, batch_size=2, known=known, **SHORT)
    assert [first, second] == alone


def test_no_hook_stays(
    pipe: Any, moved: Guide, draw: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = draw(pipe)

    def count() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules())

    hooks = count()
    guidance_error(pipe, moved, PROMPTS, **SHORT)
    assert count() == hooks
    monkeypatch.setattr(ErrorMeter, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guidance_error(pipe, moved, PROMPTS, **SHORT)
    assert count() == hooks
    assert torch.equal(draw(pipe), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompts": []}, "at least one prompt"), ({"guidance_scales": (1.0, 2.0)}, "w above 1"),
     ({"guidance_scales": ()}, "w above 1")],
)  # fmt: skip
def test_bad_input_is_named(pipe: Any, guide: Guide, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guidance_error(pipe, guide, **{"prompts": PROMPTS, **change})


def test_a_guide_for_another_denoiser_is_refused(pipe: Any, make_unet: Any) -> None:
    other = TinyGuide.for_denoiser(make_unet(block_out_channels=(8, 8)), "epsilon")
    with pytest.raises(GuideError, match="block_out_channels"):
        guidance_error(pipe, other, PROMPTS)
