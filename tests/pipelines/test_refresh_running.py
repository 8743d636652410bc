"""Refreshing with other schedulers, precisions and kinds of guides, compiled, offloaded, copied and
in threads; and what it computes, written out by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from packaging.version import Version

from pilotfish import ExternalGuide, FullGuide, Guide, GuideError, TinyGuide
from pilotfish.pipelines.loading import share_weights
from pilotfish.refresh import refresh_steps
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import PROMPTS, Pipeline, build, guide, guided, plain, small, twin
from tests.pipelines.specs import MASKED, PIPELINES
from tests.pipelines.test_copies import again, another
from tests.pipelines.test_core import NEGATIVE, encode
from tests.pipelines.test_refresh import ALL, BOTH, drawn
from tests.pipelines.test_running import FLOW, SCHEDULERS, graphs
from tests.pipelines.test_sharing import at_once, several

pytestmark = pytest.mark.usefixtures("encoded_alike")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(("name", "scheduler"), SCHEDULERS)
def test_schedulers(name: str, scheduler: str) -> None:
    """Steps are calls of the denoiser: Heun makes nearly two of them a step."""
    one = build(name)
    config = {**one.pipe.scheduler.config, "skip_prk_steps": True}
    if PIPELINES[name].family == "SD3" and not scheduler.startswith("FlowMatch"):
        config = FLOW
    one.pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    call: dict[str, Any] = {"num_inference_steps": 5}
    with one.batches() as calls:
        cfg = one.latents(**call)
    torch.testing.assert_close(drawn(one, ALL, name, **call), cfg, rtol=1e-4, atol=1e-4)
    with guide(name).attached(one.pipe, refresh=2), one.batches() as sizes:
        assert one.latents(**call).isfinite().all()
    assert len(sizes) == len(calls)
    assert [i for i, n in enumerate(sizes) if n == BOTH] == list(refresh_steps(2, len(calls)))


@pytest.mark.parametrize("kind", [ExternalGuide, FullGuide])
@pytest.mark.parametrize("name", covered("ExternalGuide"))
def test_other_kinds_of_guides(name: str, kind: type[Guide]) -> None:
    """They are not given what was found; in a step with both passes they do nothing."""
    one = build(name)
    used = guide(name, kind=kind)
    with used.attached(one.pipe, refresh=ALL):
        torch.testing.assert_close(one.latents(), plain(name), **CLOSE)
    with used.attached(one.pipe, refresh=1), one.batches() as sizes:
        one.latents()
    assert sizes.count(BOTH) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", covered("half precision"))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    one = build(name, alone=True)
    one.pipe.to(dtype)
    cfg = one.latents()
    assert torch.equal(drawn(one, ALL, name), cfg)
    found = drawn(one, [0], name)
    assert found.dtype == dtype
    assert found.isfinite().all()


@pytest.mark.parametrize("name", covered("model offload"))
def test_the_denoiser_offloaded_as_a_whole(name: str) -> None:
    expected = drawn(build(name), [0], name)
    one = build(name, alone=True)
    one.pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(drawn(one, ALL, name), plain(name), **CLOSE)
    assert torch.equal(drawn(one, [0], name), expected)


@pytest.mark.parametrize("name", covered("sequential offload"))
def test_the_denoiser_offloaded_layer_by_layer(name: str) -> None:
    expected = drawn(build(name), [0], name)
    one = build(name, alone=True)
    with guide(name).attached(one.pipe, refresh=ALL):
        accelerate.cpu_offload(one.denoiser, torch.device("cpu"))
        assert one.denoiser.device.type == "meta"
        torch.testing.assert_close(one.latents(), plain(name), **CLOSE)
    torch.testing.assert_close(drawn(one, [0], name), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", covered("threads"))
def test_threads_on_one_denoiser_with_and_without_refresh(name: str) -> None:
    one, used = build(name), guide(name)
    both = {"with": one, "without": twin(one), "plain": twin(one)}
    with used.attached(one.pipe, refresh=2), used.attached(both["without"].pipe):
        expected = {which: several(p)[0] for which, p in both.items()}
        found = at_once(**{which: lambda p=p: several(p) for which, p in both.items()})
    assert not torch.allclose(expected["with"], expected["without"])
    for which, made in found.items():
        assert [torch.equal(latents, expected[which]) for latents in made] == [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "times"), [("SD", None), ("SD", [0.9, 0.5]), ("SD3", None), ("PixArt-Sigma", None)]
)
@pytest.mark.filterwarnings("ignore:this guide was distilled")
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.11"), reason="older torch compiles such steps anew"
)
def test_a_compiled_denoiser(name: str, times: list[float] | None) -> None:
    """Nothing is compiled anew after a first call with steps of either kind. A guide for few steps
    adds to those with both passes, too."""
    torch.compiler.reset()
    one, used = small(name, times=times)
    cfg = one.latents()
    close = {"rtol": 1e-4, "atol": 1e-4}
    steps: dict[str, Any] = {"num_inference_steps": 4}
    calls: list[dict[str, Any]] = [
        steps, {**steps, "guidance_scale": 2.5}, {"num_inference_steps": 3},
        {**steps, "negative_prompt": NEGATIVE}, {**steps, "prompt": ["red", "a"]},
    ]  # fmt: skip
    with used.attached(one.pipe, refresh=1):
        expected = [one.latents(**call) for call in calls]
    with used.attached(one.pipe, refresh=3):
        more = one.latents(**steps)
    with used.attached(one.pipe, refresh=1):
        one.denoiser.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(one.latents(**steps), expected[0], **close)
        made = graphs()
        for call, other in zip(calls, expected, strict=True):
            torch.testing.assert_close(one.latents(**call), other, **close)
        assert graphs() == made
    with used.attached(one.pipe, refresh=3):
        torch.testing.assert_close(one.latents(**steps), more, **close)
        assert graphs() == made
    torch.testing.assert_close(one.latents(), cfg)


@pytest.mark.parametrize("copied", [copy, deepcopy, share_weights])
@pytest.mark.parametrize("name", covered("copy"))
def test_a_copy_refreshes_as_well(name: str, copied: Callable[[Any], Any]) -> None:
    one = build(name)
    with guide(name).attached(one.pipe, refresh=[1]):
        expected, other = one.latents(), another(one, copied(one.pipe))
        assert torch.equal(other.latents(), expected)
    assert not torch.allclose(expected, guided(name))


@pytest.mark.parametrize("refresh", [1, [0, 1]])
@pytest.mark.parametrize("name", covered("pickle"))
def test_a_pickled_pipeline_refreshes_as_well(name: str, refresh: Any) -> None:
    one = build(name, alone=True)
    with guide(name).attached(one.pipe, refresh=refresh):
        other = another(one, again(one.pipe))
        assert torch.equal(other.latents(), one.latents())


@pytest.mark.parametrize("name", ["SD img2img", "SDXL inpaint", "SD3 inpaint"])
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (1.0, 8)])
def test_places_are_those_of_the_steps_that_are_made(
    name: str, strength: float, steps: int
) -> None:
    """The first step is not the schedule's first."""
    one = build(name)
    with guide(name).attached(one.pipe, refresh=1), one.batches() as sizes:
        one.latents(strength=strength, num_inference_steps=8)
    assert [i for i, n in enumerate(sizes) if n == BOTH] == list(refresh_steps(1, steps))
    assert len(sizes) == steps


@pytest.mark.filterwarnings("ignore:this guide was distilled")
@pytest.mark.parametrize(("times", "both"), [(None, [1, 4]), ([0.9, 0.5], [2, 5])])
def test_a_guide_for_few_steps_runs_both_passes_inside_the_call(
    times: list[float] | None, both: list[int]
) -> None:
    one = build("SD")
    with guide("SD", times=times).attached(one.pipe, refresh=2), one.batches() as sizes:
        one.latents(num_inference_steps=8)
    assert [i for i, n in enumerate(sizes) if n == BOTH] == both


def test_a_call_that_ends_before_the_schedule() -> None:
    one = build("SDXL")
    with guide("SDXL").attached(one.pipe, refresh=3), one.batches() as sizes:
        one.latents(num_inference_steps=10, denoising_end=0.4)
    assert sizes == [BOTH, BOTH, BOTH, 2], "evenly spaced over the four steps that are made"


@pytest.mark.parametrize("name", covered("refresh"))
def test_nothing_that_was_found_outlives_the_call(name: str) -> None:
    one, used = build(name), guide(name)
    kept: list[weakref.ref[torch.Tensor]] = []

    def note(module: Any, args: Any) -> None:
        found = args[0].refresh
        kept.extend(weakref.ref(x) for x in (found.difference, found.conditional))

    used.register_forward_pre_hook(note)
    with used.attached(one.pipe, refresh=[0]):
        one.latents()
        gc.collect()
        assert kept
        assert [ref for ref in kept if ref() is not None] == []


def by_hand(
    one: Pipeline, noise: torch.Tensor, scales: Sequence[float], both: Sequence[int],
    part: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Equation (1) with the last difference that is known, and a part of what it would have changed
    since if it went on as between the last two."""
    scheduler, latents = one.pipe.scheduler, noise
    text, negative = encode(one, list(PROMPTS), negative_prompt=NEGATIVE)
    scheduler.set_timesteps(len(scales))
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i, t in enumerate(scheduler.timesteps):
        conditional = one.denoiser(latents, t, text)[0]
        if i in both:
            found.append((t, conditional - one.denoiser(latents, t, negative)[0]))
        difference = found[-1][1] if found else torch.zeros_like(noise)
        if len(found) > 1:
            (before, earlier), (then, last) = found[-2:]
            difference = last + part * (t - then) / (then - before) * (last - earlier)
        guided = conditional + (scales[i] - 1) * difference
        latents = scheduler.step(guided, t, latents)[0]
    return latents


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD", "SD, v"])
@pytest.mark.parametrize(
    ("refresh", "both"), [(0, ()), (2, (1, 3)), ([1, 4], (1, 4)), (ALL, range(6))]
)
def test_a_fresh_guide_reuses_the_last_difference(
    name: str, refresh: Any, both: Sequence[int]
) -> None:
    one = build(name)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(14))
    call: dict[str, Any] = {"negative_prompt": NEGATIVE, "num_inference_steps": 6}
    with guide(name, trained=False).attached(one.pipe, refresh=refresh):
        found = one.latents(latents=noise.clone(), **call)
    torch.testing.assert_close(found, by_hand(one, noise, [4.0] * 6, both), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD", "SD, v"])
@pytest.mark.parametrize("both", [(0, 2), (1, 2, 4)])
def test_a_guide_can_extrapolate_the_difference(name: str, both: Sequence[int]) -> None:
    one, used = build(name), guide(name, trained=False)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(14))
    call: dict[str, Any] = {"negative_prompt": NEGATIVE, "num_inference_steps": 6}
    assert isinstance(used, TinyGuide)
    assert used.age is not None
    used.age.to_scalings.bias[-4:] = 0.7  # of the last map that the head scales, the change
    with used.attached(one.pipe, refresh=both):
        found = one.latents(latents=noise.clone(), **call)
    expected, reuse = (by_hand(one, noise, [4.0] * 6, both, part) for part in (0.7, 0.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - reuse).norm() > 100 * (found - expected).norm()


def shorter(one: Pipeline, name: str) -> None:
    """Negative prompts of five tokens."""
    plain_encode, masked = one.pipe.encode_prompt, PIPELINES[name].family in MASKED

    def encode_prompt(*given: Any, **more: Any) -> tuple[Any, ...]:
        made = list(plain_encode(*given, **more))
        first = len(made) // 2 if masked else 1
        for i in range(first, 2 * first):
            made[i] = None if made[i] is None else made[i][:, :5]
        return tuple(made)

    one.pipe.encode_prompt = encode_prompt


@torch.no_grad()
def test_a_negative_prompt_of_another_length_is_padded_and_masked() -> None:
    one = build("SD")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(14))
    shorter(one, "SD")
    with guide("SD", trained=False).attached(one.pipe, refresh=[0, 3]):
        found = one.latents(latents=noise.clone(), negative_prompt=NEGATIVE, num_inference_steps=6)
    torch.testing.assert_close(found, by_hand(one, noise, [4.0] * 6, [0, 3]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", covered("negative prompt of another length"))
def test_a_negative_prompt_of_another_length(name: str) -> None:
    one = build(name)
    shorter(one, name)
    with guide(name).attached(one.pipe, refresh=1):
        if name in ("SD3", "Wan", "AuraFlow", "Chroma"):
            with pytest.raises(GuideError, match="are of two lengths"):
                one.latents(negative_prompt=NEGATIVE)
        else:
            assert one.latents(negative_prompt=NEGATIVE).isfinite().all()


@torch.no_grad()
def test_a_callback_changes_the_scale_between_two_refreshes() -> None:
    """The difference that was found does not depend on it."""
    one, scales = build("SD"), [4.0, 4.0, 7.0, 1.5, 3.0, 3.0]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(14))

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = scales[min(step + 1, 5)]
        return tensors

    with guide("SD", trained=False).attached(one.pipe, refresh=[1, 4]):
        found = one.latents(
            latents=noise.clone(), negative_prompt=NEGATIVE, num_inference_steps=6,
            callback_on_step_end=change,
        )  # fmt: skip
    torch.testing.assert_close(found, by_hand(one, noise, scales, [1, 4]), rtol=1e-4, atol=1e-4)
