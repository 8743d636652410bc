"""A guided pass: it misses nothing of the guide, and computes what it can once for a schedule."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pilotfish import GuideError
from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.cache import CallCache
from pilotfish.guidances import CFG
from pilotfish.guides import TinyGuide
from pilotfish.guides.tiny import Modulations
from pilotfish.interface import GuideInputs, GuideOutput, TextConditions
from tests import components
from tests.backbones.stubs import FixedGuide, guided

ALL_PARTS = {"rank": 4, "head": 4, "condition_on_negative": True, "uncond_templates": 3}


# -- layers that are skipped -------------------------------------------------------------------


def test_a_layer_that_is_skipped_is_reported(family: components.Family) -> None:
    denoiser = family.denoiser()
    guide = TinyGuide.for_denoiser(denoiser, family.prediction_type, rank=0)
    given = family.latents(2), family.text(2), family.text(1, seed=3)
    guided(denoiser, guide, *given)
    name, _ = Backbone.of(denoiser).sites()["attention"][0]
    layer = denoiser.get_submodule(name)
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)  # a wrapper is no harm
    guided(denoiser, guide, *given)

    def skip(hidden_states: Any, encoder_hidden_states: Any = None, *_: Any, **__: Any) -> Any:
        return (hidden_states, encoder_hidden_states) if joint else hidden_states

    streams = ("aura-flow", "chroma", "cogview4", "flux2", "qwen", "sd3")
    joint = family in [components.FAMILIES[name] for name in streams]

    layer.forward = skip
    with pytest.raises(GuideError, match=rf"went past {name}, to which the guide adds"):
        guided(denoiser, guide, *given)
    guided(denoiser, guide, *given, scale=1.0)


def test_fused_projections_are_reported_to_a_guide_that_adds_to_them() -> None:
    family = components.FAMILIES["unet"]
    denoiser, given = family.denoiser(), (family.latents(2), family.text(2), family.text(1))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    guide = FixedGuide(GuideOutput(residuals={name: lambda entered, made: made}))
    guided(denoiser, guide, *given)
    denoiser.fuse_qkv_projections()
    with pytest.raises(GuideError, match=r"went past .*\.to_k"):
        guided(denoiser, guide, *given)


def test_values_that_overflow_are_reported_outside_the_range_of_training() -> None:
    family = components.FAMILIES["unet"]
    denoiser, given = family.denoiser(), (family.latents(2), family.text(2), family.text(1))
    guide = FixedGuide(GuideOutput(residuals={"conv_out": lambda entered, made: 1e6 * made}))
    guided(denoiser, guide, *given, scale=8.0)
    with pytest.raises(GuideError, match=r"guidance_scale 9 is too far from \[1, 8\]"):
        guided(denoiser, guide, *given, scale=9.0)


# -- the modulations of a whole schedule -------------------------------------------------------


def tiny(family: components.Family, denoiser: Any, **settings: Any) -> TinyGuide:
    torch.manual_seed(3)
    guide = TinyGuide.for_denoiser(denoiser, family.prediction_type, **ALL_PARTS | settings)
    return components.randomise(guide)


def tensors(modulations: Modulations) -> list[torch.Tensor]:
    parts = [modulations.text_gain, *modulations.gains, *(t for p in modulations.paths for t in p)]
    parts += [*modulations.scalings, modulations.template]
    return [part for part in parts if part is not None]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"head": 0, "uncond_templates": 0}, {"text": False}])
def test_those_of_a_schedule_are_those_of_each_step(
    family: components.Family, n: int, settings: dict[str, Any]
) -> None:
    denoiser = family.denoiser()
    guide, text, negative = tiny(family, denoiser, **settings), family.text(2), family.text(1, 5)
    times = torch.tensor([0.999, 0.7, 0.35, 0.001])[:, None].expand(-1, n)
    w = torch.full((2,), 5.0)
    with torch.no_grad():
        steps = guide.modulations(times, w[None, :1], text, negative).unbind()
        assert len(steps) == len(times)
        for step, time in zip(steps, times, strict=True):
            alone = guide.modulations(time[:1].expand(2), w, text, negative)
            pairs = list(zip(tensors(step), tensors(alone), strict=True))
            assert pairs
            for one, other in pairs:
                whole = one.expand_as(other) if one.ndim == other.ndim else one
                torch.testing.assert_close(whole, other, atol=1e-6, rtol=1e-5)


class Schedule:
    """A sampling of a denoiser with a guide, which notes whether each step had a table."""

    def __init__(self, family: components.Family, monkeypatch: pytest.MonkeyPatch) -> None:
        self.family, self.denoiser = family, family.denoiser()
        self.guide = tiny(family, self.denoiser)
        self.hooks = Backbone.of(self.denoiser).install(self.guide)
        self.timesteps = torch.tensor([999, 600, 200])
        self.latents, self.text = family.latents(2), family.text(2)
        self.negative, self.scale = family.text(1, 5, seed=3), 4.0
        self.from_table: list[bool] = []
        self.tables = 0
        forward, modulations = TinyGuide.forward, TinyGuide.modulations

        def seen(guide: TinyGuide, inputs: GuideInputs, known: Any = None) -> GuideOutput:
            self.from_table.append(known is not None)
            return forward(guide, inputs, known)

        def made(guide: TinyGuide, time: torch.Tensor, *given: Any) -> Any:
            self.tables += time.ndim > 1
            return modulations(guide, time, *given)

        monkeypatch.setattr(TinyGuide, "forward", seen)
        monkeypatch.setattr(TinyGuide, "modulations", made)

    def open(self, known: bool = True) -> Any:
        return GuidedPass(
            self.guide, lambda: self.scale, lambda: self.negative,
            timesteps=lambda: self.timesteps if known else None, hooks=self.hooks,
        ).open()  # fmt: skip

    @torch.no_grad()
    def step(self, timestep: Any) -> torch.Tensor:
        """One call, whose timestep is handed over as the pipelines do it."""
        backbone = Backbone.of(self.denoiser)
        backbone.timestep = lambda time: timestep  # type: ignore[method-assign]
        return backbone(self.latents, torch.zeros(2), self.text)


@pytest.fixture
def schedule(family: components.Family, monkeypatch: pytest.MonkeyPatch) -> Schedule:
    return Schedule(family, monkeypatch)


def test_a_view_into_the_schedule_uses_its_table(schedule: Schedule) -> None:
    backbone = Backbone.of(schedule.denoiser)
    if not torch.equal(*(f(schedule.timesteps) for f in (backbone.time, backbone.schedule_time))):
        return  # its pipeline hands over numbers of its own
    with schedule.open():
        made = [schedule.step(t.expand(2)) for t in schedule.timesteps]
    assert schedule.from_table == [True] * 3
    assert schedule.tables == 1
    with schedule.open(known=False):
        expected = [schedule.step(t.expand(2)) for t in schedule.timesteps]
    assert schedule.from_table[3:] == [False] * 3
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_other_timesteps_use_no_table(schedule: Schedule) -> None:
    with schedule.open():
        schedule.step(schedule.timesteps[1].clone().expand(2))
        schedule.step(torch.tensor([600, 600]))
        schedule.step(schedule.timesteps[:2])  # another one for each sample
        schedule.scale = torch.tensor([4.0, 2.0])
        schedule.step(schedule.timesteps[1].expand(2))
    schedule.timesteps, schedule.scale = torch.arange(1000)[::400], 4.0
    with schedule.open():
        schedule.step(schedule.timesteps[1].expand(2))
    assert schedule.from_table == [False] * 5


def test_no_table_while_gradients_are_computed(schedule: Schedule) -> None:
    text, z = schedule.text, schedule.latents
    backbone = Backbone.of(schedule.denoiser)
    backbone.timestep = lambda time: schedule.timesteps[0].expand(2)  # type: ignore[method-assign]
    with schedule.open():
        backbone(z, torch.zeros(2), text)
    assert schedule.from_table == [False]


@pytest.mark.parametrize("change", ["scale", "text", "negative", "schedule", "batch"])
def test_a_table_serves_only_what_it_was_made_of(schedule: Schedule, change: str) -> None:
    """As when a callback changes the scale or the prompts on the way."""
    family = schedule.family

    def apply() -> None:
        if change == "scale":
            schedule.scale = 7.0
        elif change == "text":
            schedule.text = family.text(2, seed=9)
        elif change == "negative":
            schedule.negative = family.text(1, 5, seed=9)
        elif change == "schedule":
            schedule.timesteps = schedule.timesteps - 50
        else:
            schedule.text, schedule.latents = family.text(3), family.latents(3)

    def run(first: bool) -> torch.Tensor:
        with schedule.open():
            if first:
                schedule.step(schedule.timesteps[0].expand(2))
                apply()
            return schedule.step(schedule.timesteps[1].expand(len(schedule.latents)))

    changed = run(first=True)
    assert schedule.tables == 2
    assert torch.equal(changed, run(first=False))


def test_invalidating_forgets_the_table(schedule: Schedule) -> None:
    with schedule.open() as guided_pass:
        schedule.step(schedule.timesteps[0].expand(2))
        guided_pass.invalidate(schedule.hooks)
        schedule.step(schedule.timesteps[1].expand(2))
    assert schedule.tables == 2


def test_another_denoiser_forgets_what_a_refresh_found() -> None:
    guide: Any = SimpleNamespace(guidance=CFG)
    mine, found = object(), components.refresh(torch.ones(2, 4, 8, 8))
    guided = GuidedPass(guide, lambda: 4.0, lambda: TextConditions(torch.empty(0)), hooks=mine)
    guided.refresh = found
    guided.invalidate(mine)
    assert guided.refresh is found
    guided.invalidate(object())
    assert guided.refresh is None


@pytest.mark.parametrize("name", ["SD", "SD3", "PixArt"])
def test_pipelines_use_a_table(
    make_pipe: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pipe = {"SD": make_pipe, "SD3": components.sd3_pipeline, "PixArt": components.pixart_pipeline}[
        name
    ]()
    denoiser = Backbone.of_pipeline(pipe).denoiser
    family = components.FAMILIES[{"SD": "unet"}.get(name, name.lower())]
    guide, found, forward = tiny(family, denoiser), [], TinyGuide.forward

    def seen(guide: TinyGuide, inputs: GuideInputs, known: Any = None) -> GuideOutput:
        found.append(known is not None)
        return forward(guide, inputs, known)

    monkeypatch.setattr(TinyGuide, "forward", seen)
    short = {} if name == "SD" else {"max_sequence_length": 8}
    if name == "PixArt":
        short |= {"use_resolution_binning": False, "clean_caption": False}
    with guide.attached(pipe):
        pipe(
            ["cat", "a"], negative_prompt=["b", "cat"], num_inference_steps=3, guidance_scale=4.0,
            output_type="latent", **short,
        )  # fmt: skip
    assert found == [True] * 3


@pytest.mark.parametrize("changed", ["scale", "prompt", "prompt in place", "negative in place"])
def test_a_callback_that_changes_scale_or_prompts_is_followed(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    guide = tiny(components.FAMILIES["unet"], pipe.unet)
    inputs = ["prompt_embeds", "negative_prompt_embeds"]

    def change(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 0 and changed == "scale":
            pipe._guidance_scale = 7.0
        elif step == 0 and changed == "prompt":
            given["prompt_embeds"] = given["prompt_embeds"].flip(1)
        elif step == 0 and changed == "prompt in place":
            given["prompt_embeds"].mul_(-1)
        elif step == 0:
            given["negative_prompt_embeds"].mul_(-1)
        return given

    def run() -> torch.Tensor:
        made: torch.Tensor = pipe(
            "cat", negative_prompt="a", num_inference_steps=3, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0), output_type="latent",
            callback_on_step_end=change, callback_on_step_end_tensor_inputs=inputs,
        ).images  # fmt: skip
        return made

    with guide.attached(pipe):
        with_tables = run()
        monkeypatch.setattr("pilotfish.backbones.cache.step_of", lambda *_: None)
        monkeypatch.setattr(CallCache, "made_by", lambda self, module, make, parts=(): make())
        torch.testing.assert_close(with_tables, run(), atol=1e-4, rtol=1e-4)


def test_inputs_are_read_as_they_are_given(family: components.Family) -> None:
    """By name or position, timesteps as numbers or tensors, one scale or several."""
    denoiser, guide = family.denoiser(), FixedGuide()
    z, text, negative = family.latents(2), family.text(2), family.text(1, 5)
    time, w = torch.tensor([0.9, 0.25]), torch.tensor([2.5, 7.0])
    guided(denoiser, guide, z, text, negative, time=time, scale=w)
    guided(denoiser, guide, z, text, negative, time=time, scale=3.5)
    first, second = guide.inputs
    torch.testing.assert_close(first.time, time)
    assert torch.equal(first.guidance_scale, w)
    assert second.guidance_scale.tolist() == [3.5, 3.5]
    assert first.negative is negative
    if family is components.FAMILIES["z-image"]:  # which is given lists
        assert text.mask is not None
        count = int(text.mask[1].sum())
        assert torch.equal(first.text.embeds[1, :count], text.embeds[1, :count])
        assert first.text.mask.sum(1).tolist() == text.mask.sum(1).tolist()
    else:
        assert first.text.embeds is text.embeds
        assert first.text.pooled is text.pooled
        if family is components.FAMILIES["chroma"]:  # which is given one for the image as well
            torch.testing.assert_close(first.text.mask, text.mask, check_dtype=False)
        else:
            assert first.text.mask is text.mask
    patch = getattr(denoiser.config, "patch_size", 1)
    patch = patch if isinstance(patch, int) else patch[-1]
    patch = 2 if family is components.FAMILIES["z-image"] else patch
    patch = 1 if family is components.FAMILIES["qwen"] else patch  # it is given tokens
    frames = z[0, 0].numel() // 64
    assert first.latents.shape == (2, 4 * patch**2, frames * 8 // patch, 8 // patch)
    assert isinstance(first.text, TextConditions)


def test_a_change_at_every_step_makes_few_tables(schedule: Schedule) -> None:
    """As a callback at every step does: from the third step on each computes its own."""
    with schedule.open() as guided_pass:
        for timestep in schedule.timesteps:
            schedule.step(timestep.expand(2))
            guided_pass.invalidate(schedule.hooks)
    assert schedule.tables == 2
    assert schedule.from_table == [True, True, False]
