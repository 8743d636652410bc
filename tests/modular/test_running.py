"""A guider's steps: which are guided and refreshed, what stays on the denoiser, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from pilotfish import GuideError, PilotfishGuidance, TinyGuide
from pilotfish.backbones import GuidedPass
from pilotfish.modular.call import refresh_plan, schedule_of
from tests import components
from tests.modular.pipelines import Modular, build, guider
from tests.pipelines.pipelines import guide

Saved = Callable[..., Path]


@pytest.fixture
def sdxl() -> Modular:
    return build("SDXL")


# -- steps ----------------------------------------------------------------------------------


def test_start_and_stop_bound_the_guidance(
    sdxl: Modular, saved: Saved, refreshes: list[int]
) -> None:
    """And a number of refreshes is spread over the guided steps."""
    seen: list[float] = []
    for start, stop, expected in (0.5, 1.0, [0.5, 0.25]), (0.0, 0.5, [1.0, 0.75]):
        made = guider(sdxl, saved("SDXL"), start=start, stop=stop, refresh=1)
        noted = PilotfishGuidance._begin_call

        def note(self: Any, backbone: Any, noted: Any = noted) -> Any:
            call = noted(self, backbone)
            call.guide.register_forward_pre_hook(
                lambda _, args: seen.append(round(float(args[0].time[0]), 2))
            )
            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PilotfishGuidance, "_begin_call", note)
            sdxl.latents(made, steps=4)
        assert len(refreshes) == 1
        assert {*seen} < {*expected}, "the other guided step is the refresh"
        assert (sdxl.one.hooks(), made._call) == (0, None)
        seen.clear()
        refreshes.clear()


def test_a_plan_of_refreshes() -> None:
    assert refresh_plan(2, 9, (0, 9), few_steps=True) == (3, 6)
    assert refresh_plan(2, 12, (3, 12), few_steps=True) == (6, 9)
    assert refresh_plan(1.0, 4, (1, 3)) == (1, 2)
    assert refresh_plan((0, 2, 7), 4, (1, 3)) == (0, 2), "steps of the call"


def test_the_ratio_of_the_guide_where_none_is_asked_for(
    sdxl: Modular, tmp_path: Path, refreshes: list[int]
) -> None:
    used = guide("SDXL")
    used.register_to_config(refresh_ratio=0.5)
    used.save_pretrained(tmp_path)
    sdxl.latents(guider(sdxl, tmp_path, refresh=None), steps=4)
    assert len(refreshes) == 2


def test_solvers_with_two_calls_in_a_step(
    sdxl: Modular, saved: Saved, refreshes: list[int]
) -> None:
    sdxl.pipe.scheduler = HeunDiscreteScheduler.from_config(sdxl.pipe.scheduler.config)
    made = guider(sdxl, saved("SDXL"), refresh=[1, 2])
    sdxl.latents(made)
    assert refreshes == [1, 2]
    assert (sdxl.one.hooks(), made._call) == (0, None)


def test_a_schedule_is_found_from_its_timesteps() -> None:
    schedule = torch.tensor([9, 5, 1])
    for i, timestep in enumerate(schedule[1:]):
        found = schedule_of(timestep)
        assert found is not None
        assert found.tolist() == [9, 5, 1]
        assert timestep.storage_offset() == 1 + i
    assert schedule_of(torch.tensor(5)) is None
    assert schedule_of(5) is None


def test_each_denoiser_of_wan_has_its_guider(saved: Saved, refreshes: list[int]) -> None:
    one = build("Wan 2.2")
    first = guider(one, saved("Wan 2.2"), refresh=2)
    second = first.new(guidance_scale=3.0)
    assert (second.guidance_scale, second.refresh) == (3.0, 2)
    found = one.latents((first, second), steps=4)
    assert first._shared is second._shared, "weights, and what the first refresh found"
    assert len(refreshes) == 2, "of the call"
    assert one.one.hooks() == 0
    assert first._call.guided.refresh is None, "nothing is kept"
    apart = guider(one, saved("Wan 2.2"), refresh=2, guidance_scale=3.0)
    assert not torch.allclose(one.latents((first, apart), steps=4), found)
    assert len(refreshes) == 4
    with guide("Wan 2.2").attached(one.one.pipe, refresh=2):
        call = one._call(4) | dict(one.one.call) | {"output_type": "latent"}
        expected = one.one.pipe(**call | {"guidance_scale": 4.0, "guidance_scale_2": 3.0})[0]
    assert torch.equal(found, expected)


def test_the_scale_of_classifier_free_guidance(saved: Saved) -> None:
    """That of the standard pipeline unless another is asked for: of Z-Image w - 1."""
    one = build("Z-Image")
    found = one.latents(guider(one, saved("Z-Image")))
    for scale, original in (4.0, False), (3.0, True):
        made = guider(one, saved("Z-Image"), guidance_scale=scale,
                      use_original_formulation=original)  # fmt: skip
        assert torch.equal(one.latents(made), found)
    assert not guider(one, "x", guidance_scale=0.0).requires_unconditional_embeds
    assert guider(one, "x", guidance_scale=0.5).num_conditions == 2
    small = guider(one, "x", guidance_scale=0.5, use_original_formulation=False)
    assert small.num_conditions == 1
    assert guider(one, "x", enabled=False).num_conditions == 1


# -- what stays on the denoiser -------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_denoiser_ends_the_call(
    sdxl: Modular, saved: Saved, error: type[BaseException]
) -> None:
    made, plain = guider(sdxl, saved("SDXL"), refresh=[0]), sdxl.one.latents()
    expected, calls = sdxl.latents(made), iter(range(9))

    def fail(module: Any, args: Any) -> None:
        if next(calls) == 1:
            raise error

    handle = sdxl.one.denoiser.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(error):
        sdxl.latents()
    handle.remove()
    if error is RuntimeError:  # torch runs no hook where it is interrupted
        assert sdxl.one.hooks() == 0
        assert GuidedPass.current() is None
        assert made._call is None
    assert torch.equal(sdxl.one.latents(), plain), "a plain pipeline on the denoiser"
    assert torch.equal(sdxl.latents(), expected)
    assert sdxl.one.hooks() == 0


def test_another_thread_on_the_denoiser_is_not_guided(sdxl: Modular, saved: Saved) -> None:
    net, made = sdxl.one.denoiser, guider(sdxl, saved("SDXL"))
    generator = torch.Generator().manual_seed(1)
    text, pooled = (torch.randn(*s, generator=generator) for s in ((2, 8, 32), (2, 16)))
    latents, sizes = torch.randn(2, 4, 8, 8, generator=generator), torch.ones(2, 6)
    found: list[torch.Tensor] = []

    def call() -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": sizes}
        with torch.no_grad():
            made: torch.Tensor = net(latents, 999, text, added_cond_kwargs=added)[0]
        return made

    plain = call()
    made.set_state(0, 2, torch.tensor([999, 499])[0])
    made.prepare_inputs({"prompt_embeds": (text, -text), "text_embeds": (pooled, -pooled)})
    made.prepare_models(net)
    thread = Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    guided, second = call(), call()
    made.cleanup_models(net)
    assert torch.equal(found[0], plain)
    assert not torch.allclose(guided, plain)
    assert torch.equal(second, plain), "one call was prepared"
    made.disable()
    assert sdxl.one.hooks() == 0


def test_a_compiled_denoiser_is_compiled_once(tmp_path: Path) -> None:
    """Its hooks are the same ones at every step, and in the next call."""
    torch._dynamo.reset()
    net, graphs = components.pixart_transformer(num_layers=1), list[int]()
    torch.manual_seed(3)
    components.randomise(TinyGuide.for_denoiser(net, "epsilon"), by=0.05).save_pretrained(tmp_path)
    made, generator = PilotfishGuidance(tmp_path, refresh=0), torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text, mask = torch.randn(2, 8, 16, generator=generator), torch.ones(2, 8)

    def call() -> torch.Tensor:
        schedule = torch.tensor([999, 499])
        for i, timestep in enumerate(schedule):
            made.set_state(i, 2, timestep)
            pairs = {"encoder_hidden_states": (text, -text), "encoder_attention_mask": (mask, mask)}
            made.prepare_inputs(pairs)
            made.prepare_models(net)
            with torch.no_grad():
                found: torch.Tensor = net(
                    latents, encoder_hidden_states=text, timestep=timestep.expand(2),
                    added_cond_kwargs={}, encoder_attention_mask=mask, return_dict=False,
                )[0]  # fmt: skip
            made.cleanup_models(net)
            hooks = (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
            assert sum(hooks) == 0
        return found

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    expected = call()
    net.compile(backend=backend)
    torch.testing.assert_close(call(), expected)
    count = len(graphs)
    call()
    assert len(graphs) == count > 0


# -- refused --------------------------------------------------------------------------------


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(GuideError, match="guide must be a path or a hub id, not a TinyGuide"):
        PilotfishGuidance(guide("SDXL"))  # type: ignore[arg-type]
    with pytest.raises(GuideError, match="refresh must be a number of steps"):
        PilotfishGuidance("x", refresh=-1)


def test_a_guide_that_does_not_fit_is_refused(sdxl: Modular, saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(GuideError, match="was made for another denoiser"):
        sdxl.latents(guider(sdxl, saved("SD3")))
    with pytest.raises(GuideError, match="no guide could be read from"):
        sdxl.latents(guider(sdxl, tmp_path))
    with pytest.raises(GuideError, match="guidance_scale must be a finite number"):
        sdxl.latents(guider(sdxl, saved("SDXL"), guidance_scale=float("inf")))
    assert sdxl.one.hooks() == 0


def test_a_denoiser_of_no_family_is_refused_where_it_would_be_guided(saved: Saved) -> None:
    """Such as those of the standard pipelines with a guider: HunyuanVideo 1.5, Motif-Video."""
    for stop in (0.0, 1.0):
        made = PilotfishGuidance(saved("SD3"), stop=stop)
        made.set_state(0, 1, torch.tensor([999, 0])[0])
        if stop == 0.0:
            made.prepare_models(torch.nn.Linear(1, 1))
        else:
            with pytest.raises(GuideError, match="Linear belongs to no family that takes a guide"):
                made.prepare_models(torch.nn.Linear(1, 1))


def test_a_missing_negative_prompt_is_refused(saved: Saved) -> None:
    one = build("SD3")
    made = guider(one, saved("SD3"))
    made.set_state(0, 1, torch.tensor([999, 0])[0])
    made.prepare_inputs({"encoder_hidden_states": torch.zeros(1, 8, 32)})
    with pytest.raises(GuideError, match="has encoded no negative prompt"):
        made.prepare_models(one.one.denoiser)


def test_a_controlnet_is_refused_in_a_refresh_alone(saved: Saved) -> None:
    """The block runs it on the prompt, and a guider does not see it."""
    name = "SDXL ControlNet"
    one = build(name)
    image = {"control_image": one.one.images["image"]}
    found = one.latents(guider(one, saved(name)), **image)
    with guide(name).attached(one.one.pipe, refresh=0):
        call = one._call(3) | {"output_type": "latent", "guidance_scale": 4.0}
        expected = one.one.pipe(**call, image=image["control_image"])[0]
    assert torch.equal(found, expected)
    with pytest.raises(GuideError, match="use the guider with refresh=0"):
        one.latents(guider(one, saved(name), refresh=[1]), **image)
    assert one.one.hooks() == 0


def test_a_scale_outside_the_training_is_warned_of(sdxl: Modular, saved: Saved) -> None:
    with pytest.warns(UserWarning, match=r"guidance_scale 30 lies outside \["):
        sdxl.latents(guider(sdxl, saved("SDXL"), guidance_scale=30.0))
    sizes = {"negative_original_size": (64, 64), "negative_target_size": (16, 16)}
    with pytest.warns(UserWarning, match="sizes, crops or scores of the negative prompt"):
        sdxl.latents(guider(sdxl, saved("SDXL")), **sizes)
