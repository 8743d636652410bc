from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.metrics import (
    SAME_PICTURE,
    AgreementMeter,
    FrechetMeter,
    LatentMeter,
    PromptMeter,
    gain_kept,
    gain_kept_interval,
    indices,
)


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_picture_that_is_its_name_is_found() -> None:
    names = torch.eye(8)
    meter = PromptMeter(names)
    meter.update(names, torch.arange(8))
    assert meter.compute() == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("better", "first", "five"), [(0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0)])
def test_the_rank_decides(better: int, first: int, five: int) -> None:
    picture = torch.full((1, 8), 0.1)
    picture[0, 0] = 0.5
    picture[0, 1 : better + 1] = 0.9
    meter = PromptMeter(torch.eye(8))
    meter.update(picture, torch.tensor([0]))
    assert meter.compute()[:2] == (first, five)


def test_a_judge_that_finds_all_alike_knows_nothing() -> None:
    meter = PromptMeter(torch.ones(8, 4) / 2)
    meter.update(torch.ones(3, 4) / 2, torch.arange(3))
    assert meter.compute()[:2] == (0.0, 0.0)


def test_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    names, made = (F.normalize(torch.randn(n, 6, generator=generator)) for n in (20, 50))
    right = torch.randint(20, (50,), generator=generator)
    whole, parts = PromptMeter(names), PromptMeter(names)
    whole.update(made, right)
    for i in range(0, 50, 7):
        parts.update(made[i : i + 7], right[i : i + 7])
    assert whole.compute() == pytest.approx(parts.compute())


def test_a_set_is_at_no_distance_from_itself(judge: Judge) -> None:
    real = pictures(40)
    same, other = FrechetMeter(judge, real), FrechetMeter(judge, real)
    same.update(real.flip(0))
    other.update(real * 0.1 + 0.8)
    assert same.compute() == pytest.approx(0, abs=1e-3)
    assert other.compute() > 0.1


def test_the_distance_is_that_of_the_two_gaussians(judge: Judge) -> None:
    real, made = pictures(30), pictures(30, seed=1) * 0.5
    meter = FrechetMeter(judge, real)
    meter.update(made[:11])
    meter.update(made[11:])
    a, b = (judge.pooled(x).double() for x in (real, made))
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
    assert meter.compute() == pytest.approx(float(expected - 2 * cross), rel=1e-3, abs=1e-4)


def test_no_reference_no_distance(judge: Judge) -> None:
    meter = FrechetMeter(judge, None)
    meter.update(pictures(2))
    assert math.isnan(meter.compute())


def test_one_picture_is_too_few(judge: Judge) -> None:
    meter = FrechetMeter(judge, pictures(4))
    meter.update(pictures(1))
    with pytest.raises(ValueError, match="at least two"):
        meter.compute()


def test_a_picture_agrees_with_itself(judge: Judge) -> None:
    x = pictures(3)
    meter = AgreementMeter()
    meter.update(x, x, judge.images(x), judge.images(x))
    agreement = meter.compute()
    assert agreement.psnr == SAME_PICTURE
    assert agreement.ssim == pytest.approx(1, abs=1e-4)
    assert agreement.cosine == pytest.approx(1, abs=1e-5)


def test_psnr_of_a_known_error(judge: Judge) -> None:
    x, other = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.2)
    meter = AgreementMeter()
    for i in range(2):
        part = slice(i, i + 1)
        features = judge.images(x[part])
        meter.update(x[part], other[part], features, features)
    assert meter.compute().psnr == pytest.approx(10 * math.log10(2**2 / 0.2**2), abs=1e-3)


def test_latents_of_the_teacher_are_at_0_and_of_no_guide_at_1() -> None:
    generator = torch.Generator().manual_seed(2)
    cfg, none = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    for guided, expected in ((cfg, 0.0), (none, 1.0), ((cfg + none) / 2, 0.25)):
        meter = LatentMeter()
        meter.update(guided[:1], none[:1], cfg[:1])
        meter.update(guided[1:], none[1:], cfg[1:])
        assert meter.compute() == pytest.approx(expected)


def test_where_cfg_changes_nothing_there_is_no_ratio() -> None:
    meter = LatentMeter()
    x = torch.ones(1, 4, 2, 2)
    meter.update(x, x, x)
    assert math.isnan(meter.compute())
    assert math.isnan(gain_kept(0.4, 0.4, 0.5))


@given(none=st.floats(0, 0.4), gain=st.floats(0.01, 0.5), kept=st.floats(-1, 2))
def test_gain_kept_is_the_share_of_the_gain(none: float, gain: float, kept: float) -> None:
    assert gain_kept(none, none + gain, none + kept * gain) == pytest.approx(kept, abs=1e-6)


def test_prompts_find_their_place_among_the_names() -> None:
    assert indices(["c", "a", "c"], ["a", "b", "c"]).tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("prompts", "names", "message"),
    [(["a", "dog"], ["a"], r"1 prompts are not among the names: \['dog'\]"),
     (["a"], ["a", "b", "a"], "'a' stands twice")],
)  # fmt: skip
def test_names_that_do_not_serve(prompts: list[str], names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        indices(prompts, names)


def test_the_interval_holds_the_gain_kept_and_narrows_with_more_pictures() -> None:
    generator = torch.Generator().manual_seed(2)
    widths = []
    for n in (50, 800):
        chance = torch.rand(n, generator=generator)
        none, cfg, guided = ((chance < p).float() for p in (0.2, 0.8, 0.7))
        low, high = gain_kept_interval(none, cfg, guided, rounds=400)
        whole = gain_kept(*(float(x.mean()) for x in (none, cfg, guided)))
        assert low < whole < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_guide_that_is_cfg_keeps_all_of_it_for_certain() -> None:
    none, cfg = torch.zeros(40), torch.ones(40)
    assert gain_kept_interval(none, cfg, cfg, rounds=50) == (1, 1)


def test_no_gain_has_no_interval() -> None:
    same = torch.ones(40)
    assert all(math.isnan(end) for end in gain_kept_interval(same, same, same, rounds=50))
