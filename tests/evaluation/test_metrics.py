from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.metrics import (
    MAX_PSNR,
    AgreementMeter,
    FrechetMeter,
    LatentMeter,
    RetrievalMeter,
    gain_kept,
    gain_kept_interval,
    indices,
)


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_an_image_of_its_name_is_found() -> None:
    names = torch.eye(8)
    meter = RetrievalMeter(names)
    meter.update(names, torch.arange(8))
    assert meter.compute() == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("better", "first", "five"), [(0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0)])
def test_the_rank_decides(better: int, first: int, five: int) -> None:
    image = torch.full((1, 8), 0.1)
    image[0, 0] = 0.5
    image[0, 1 : better + 1] = 0.9
    meter = RetrievalMeter(torch.eye(8))
    meter.update(image, torch.tensor([0]))
    assert meter.compute()[:2] == (first, five)


def test_a_scorer_that_finds_all_alike_knows_nothing() -> None:
    meter = RetrievalMeter(torch.ones(8, 4) / 2)
    meter.update(torch.ones(3, 4) / 2, torch.arange(3))
    assert meter.compute()[:2] == (0.0, 0.0)


def test_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    names, made = (F.normalize(torch.randn(n, 6, generator=generator)) for n in (20, 50))
    right = torch.randint(20, (50,), generator=generator)
    whole, parts = RetrievalMeter(names), RetrievalMeter(names)
    whole.update(made, right)
    for i in range(0, 50, 7):
        parts.update(made[i : i + 7], right[i : i + 7])
    assert whole.compute() == pytest.approx(parts.compute())


def test_a_set_is_at_no_distance_from_itself(scorer: Scorer) -> None:
    real = images(40)
    same, other = FrechetMeter(scorer, real), FrechetMeter(scorer, real)
    same.update(real.flip(0))
    other.update(real * 0.1 + 0.8)
    assert same.compute() == pytest.approx(0, abs=1e-3)
    assert other.compute() > 0.1


def test_the_distance_is_that_of_the_two_gaussians(scorer: Scorer) -> None:
    real, made = images(30), images(30, seed=1) * 0.5
    meter = FrechetMeter(scorer, real)
    meter.update(made[:11])
    meter.update(made[11:])
    a, b = (scorer.pooled(x).double() for x in (real, made))
    cross = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()
    assert meter.compute() == pytest.approx(float(expected - 2 * cross), rel=1e-3, abs=1e-4)


def test_no_reference_no_distance(scorer: Scorer) -> None:
    meter = FrechetMeter(scorer, None)
    meter.update(images(2))
    assert math.isnan(meter.compute())


def test_one_image_is_too_few(scorer: Scorer) -> None:
    meter = FrechetMeter(scorer, images(4))
    meter.update(images(1))
    with pytest.raises(ValueError, match="at least two"):
        meter.compute()


def test_an_image_agrees_with_itself(scorer: Scorer) -> None:
    x = images(3)
    meter = AgreementMeter()
    meter.update(x, x, scorer.images(x), scorer.images(x))
    agreement = meter.compute()
    assert agreement.psnr == MAX_PSNR
    assert agreement.ssim == pytest.approx(1, abs=1e-4)
    assert agreement.cosine == pytest.approx(1, abs=1e-5)


def test_psnr_of_a_known_error(scorer: Scorer) -> None:
    x, other = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.2)
    meter = AgreementMeter()
    for i in range(2):
        part = slice(i, i + 1)
        features = scorer.images(x[part])
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
     (["a"], ["a", "b", "a"], "'a' occurs twice")],
)  # fmt: skip
def test_names_that_do_not_serve(prompts: list[str], names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        indices(prompts, names)


def hits(chance: torch.Tensor) -> list[torch.Tensor]:
    """Without guidance, with CFG, guided: 20, 80 and 70 % of the images are right."""
    return [(chance < p).float() for p in (0.2, 0.8, 0.7)]


def width(chance: torch.Tensor, prompt: torch.Tensor) -> float:
    found = gain_kept_interval(*hits(chance), prompt=prompt, resamples=400)
    assert found.low < gain_kept(*(float(x.mean()) for x in hits(chance))) < found.high
    return found.high - found.low


def test_the_interval_narrows_with_more_prompts() -> None:
    generator = torch.Generator().manual_seed(2)
    few, many = (width(torch.rand(n, generator=generator), torch.arange(n)) for n in (50, 800))
    assert many < few / 2


def test_the_interval_does_not_narrow_with_images_that_repeat_a_prompt() -> None:
    """Sixteen equal images of each prompt are no more evidence than one."""
    chance = torch.rand(50, generator=torch.Generator().manual_seed(2))
    once = width(chance, torch.arange(50))
    repeated = width(chance.repeat(16), torch.arange(50).repeat(16))
    as_if_independent = width(chance.repeat(16), torch.arange(800))
    assert repeated == pytest.approx(once)
    assert as_if_independent < repeated / 2


def test_prompts_with_more_images_weigh_more() -> None:
    prompt = torch.tensor([0, 0, 0, 1])
    none, cfg = torch.zeros(4), torch.ones(4)
    guided = torch.tensor([1.0, 1.0, 1.0, 0.0])
    found = gain_kept_interval(none, cfg, guided, prompt=prompt, resamples=200)
    assert (found.low, found.high) == (0, 1)
    assert gain_kept(0, 1, 0.75) == 0.75


def test_a_guide_that_is_cfg_keeps_all_of_it_for_certain() -> None:
    none, cfg = torch.zeros(40), torch.ones(40)
    found = gain_kept_interval(none, cfg, cfg, prompt=torch.arange(40), resamples=50)
    assert (found.low, found.high) == (1, 1)


@pytest.mark.parametrize("prompts", [1, 40])
def test_one_prompt_or_no_gain_has_no_interval(prompts: int) -> None:
    same = torch.ones(40)
    found = gain_kept_interval(same, same, same, prompt=torch.arange(40) % prompts)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
