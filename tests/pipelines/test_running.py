"""How a pipeline is run: its scheduler, its guide, its precision, memory and speed."""

from __future__ import annotations

from typing import Any

import accelerate
import diffusers
import pytest
import torch

from pilotfish import ExternalGuide, FullGuide, Guide, GuideError, TinyGuide
from pilotfish.backbones import GuidedPass
from tests import components
from tests.pipelines.matrix import FEATURES, ONE, covered
from tests.pipelines.pipelines import PROMPTS, Pipeline, build, guide, guided, scheduler, small
from tests.pipelines.specs import PIPELINES

SCHEDULERS = [
    pytest.param(name, feature, id=f"{name}-{feature}")
    for feature in FEATURES
    if feature.endswith("Scheduler")
    for name in covered(feature)
]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


def is_conditional(
    one: Pipeline, name: str, kind: type[Guide] = TinyGuide, changes: bool = True
) -> None:
    """A fresh guide is the conditional model in one pass a step, and a trained one is not."""
    with one.batches() as expected:
        conditional = one.latents(guidance_scale=1.0)
    with guide(name, False, kind).attached(one.pipe), one.batches() as sizes:
        assert torch.equal(one.latents(), conditional)
    assert sizes == expected
    if changes:
        with guide(name, kind=kind).attached(one.pipe):
            assert not torch.allclose(one.latents(), conditional)


@pytest.mark.parametrize(("name", "scheduler"), SCHEDULERS)
def test_schedulers(name: str, scheduler: str) -> None:
    one = build(name)
    config = {**one.pipe.scheduler.config, "skip_prk_steps": True}  # as PNDM's own has it
    if PIPELINES[name].family == "SD3" and not scheduler.startswith("FlowMatch"):
        config = FLOW
    one.pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    is_conditional(one, name, changes=False)


CHANGES = {
    "SD": ("epsilon", components.scheduler("v_prediction"), "v_prediction"),
    "SD, v": ("v_prediction", components.scheduler("epsilon"), "epsilon"),
    "SD3": ("flow", components.scheduler("epsilon"), "epsilon"),
}
"""The prediction of a pipeline's denoiser, and a scheduler for another."""


@pytest.mark.parametrize("how", ["replaced", "edited"])
@pytest.mark.parametrize("name", covered("prediction_type"))
def test_another_prediction_type_is_refused_naming_both(name: str, how: str) -> None:
    one, used = build(name), guide(name)
    trained, other, predicted = CHANGES[name]
    both = f"predicts {trained}, and the pipeline's scheduler takes its prediction for {predicted};"

    def change(pipe: Any) -> None:
        if how == "replaced" or name == "SD3":  # whose scheduler has nothing to edit
            pipe.scheduler = other
        else:
            pipe.scheduler.register_to_config(prediction_type=predicted)

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        change(pipe)
        return tensors

    with used.attached(one.pipe):
        with one.batches() as sizes, pytest.raises(GuideError, match=both):
            one.latents(callback_on_step_end=callback)
        assert sizes == [2]
        with one.batches() as sizes, pytest.raises(GuideError, match=both):
            one.latents()
        assert sizes == []
        one.pipe.scheduler = scheduler(name)
        assert torch.equal(one.latents(), guided(name))
    change(one.pipe)
    with pytest.raises(GuideError, match=f"guide {trained}, denoiser {predicted}"):
        used.attach(one.pipe)
    assert one.hooks() == 0


@pytest.mark.parametrize("name", covered("ExternalGuide"))
def test_an_external_guide(name: str) -> None:
    is_conditional(build(name), name, ExternalGuide)


@pytest.mark.parametrize("name", covered("FullGuide"))
def test_a_full_guide(name: str) -> None:
    is_conditional(build(name), name, FullGuide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", covered("half precision"))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    one, used = build(name, alone=True), guide(name)
    one.pipe.to(dtype)
    with used.attached(one.pipe):
        found = one.latents()
    assert found.dtype == dtype
    assert used.dtype == torch.float32
    assert found.isfinite().all()
    is_conditional(one, name, changes=False)


@pytest.mark.parametrize("name", covered("model offload"))
def test_the_denoiser_offloaded_as_a_whole(name: str) -> None:
    one = build(name, alone=True)
    with guide(name).attached(one.pipe):
        one.pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(one.latents(), guided(name))
    is_conditional(one, name, changes=False)


@pytest.mark.parametrize("name", covered("sequential offload"))
def test_the_denoiser_offloaded_layer_by_layer(name: str) -> None:
    one, used = build(name, alone=True), guide(name)
    with used.attached(one.pipe):
        accelerate.cpu_offload(one.denoiser, torch.device("cpu"))
        assert one.denoiser.device.type == "meta"
        # what depends on time and text is computed step by step, where weights come and go
        torch.testing.assert_close(one.latents(), guided(name), atol=1e-3, rtol=1e-4)
    assert used.device.type == "cpu"
    is_conditional(one, name, changes=False)


@pytest.mark.parametrize(
    ("name", "stream"),
    [("SD3", "joint"), ("SD3", "cached"), ("AuraFlow", "cached"), ("Z-Image", "cached")],
)
def test_weights_that_come_when_the_denoiser_is_called(name: str, stream: str) -> None:
    """As those of a denoiser that is offloaded as a whole to another device, here to none."""
    one, used = build(name, alone=True), guide(name, negative_stream=stream)
    hook = accelerate.hooks.AlignDevicesHook("cpu", offload=True, place_submodules=True)
    with used.attached(one.pipe):
        expected = one.latents()
        accelerate.hooks.add_hook_to_module(one.denoiser, hook)
        assert one.denoiser.device.type == "meta"
        torch.testing.assert_close(one.latents(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", covered("attention slicing"))
def test_attention_in_slices(name: str) -> None:
    one = build(name)
    with guide(name).attached(one.pipe):
        one.pipe.enable_attention_slicing(1)
        torch.testing.assert_close(one.latents(), guided(name), atol=1e-3, rtol=1e-3)
    is_conditional(one, name, changes=False)


@pytest.mark.parametrize("name", covered("fuse_qkv_projections"))
def test_fused_projections(name: str) -> None:
    one = build(name)
    with guide(name).attached(one.pipe):
        one.denoiser.fuse_qkv_projections()
        torch.testing.assert_close(one.latents(), guided(name), atol=1e-3, rtol=1e-3)
    is_conditional(one, name, changes=False)


def test_fused_joint_attention_is_refused_in_a_call() -> None:
    whole = {"in_channels": 16, "out_channels": 16, "dual_attention_layers": ()}  # as diffusers can
    one = build("SD3", transformer=components.sd3_transformer(**whole))
    used = TinyGuide.for_denoiser(one.denoiser, "flow").eval()
    one.denoiser.fuse_qkv_projections()
    with (
        used.attached(one.pipe),
        pytest.raises(GuideError, match=r"went past transformer_blocks\.0\.attn, to which"),
    ):
        one.latents()


@pytest.mark.parametrize("name", covered("FreeU"))
def test_freeu(name: str) -> None:
    one = build(name)
    one.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    is_conditional(one, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", covered("torch.compile"))
def test_a_compiled_denoiser(name: str) -> None:
    a_compiled_denoiser_is_guided_as_before(name)


@pytest.mark.slow
def test_a_compiled_denoiser_with_a_cached_stream() -> None:
    a_compiled_denoiser_is_guided_as_before("SD3", negative_stream="cached")


def a_compiled_denoiser_is_guided_as_before(name: str, **settings: Any) -> None:
    """And compiled once for all calls."""
    first = "compiled" if name == "SDXL" else "attached"
    torch.compiler.reset()
    one, used = small(name, **{"uncond_templates": 2} | settings)
    cfg = one.latents()
    calls: list[dict[str, Any]] = [
        {}, {"guidance_scale": 2.5}, {"num_inference_steps": 3},
        {"negative_prompt": ["a cat"] * len(PROMPTS)}, {"negative_prompt": ["a cat", "red"]},
        {"prompt": ["red", "a"]},
    ]  # fmt: skip
    with used.attached(one.pipe):
        expected = [one.latents(**call) for call in calls]
    if first == "compiled":
        one.denoiser = torch.compile(one.denoiser, backend="eager", fullgraph=True)
        torch.testing.assert_close(one.latents(), cfg)
    with used.attached(one.pipe):
        if first == "attached":
            one.denoiser.compile(backend="eager", fullgraph=True)  # in place
        torch.testing.assert_close(one.latents(), expected[0])
        made = graphs()
        for call, other in zip(calls, expected, strict=True):
            torch.testing.assert_close(one.latents(**call), other)
        assert graphs() == made
    torch.testing.assert_close(one.latents(), cfg)


@pytest.mark.slow
@pytest.mark.parametrize("name", covered("compile_repeated_blocks"))
def test_a_denoiser_compiled_block_by_block(name: str) -> None:
    """Its blocks are one piece of code, and each is extrapolated in its own way."""
    torch.compiler.reset()
    one, used = small(name)
    cfg = one.latents()
    with used.attached(one.pipe):
        expected = one.latents()
        one.denoiser.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(one.latents(), expected)
        for prompts in (["red"], ["a", "cat", "dog"]):
            one.latents(prompt=prompts)
    torch.testing.assert_close(one.latents(), cfg)


def graphs() -> int:
    """Those that torch.compile has made."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", [n for n in ONE if n != "Z-Image"])  # given another list each step
def test_what_depends_on_the_schedule_alone_is_computed_once_for_all_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a pipeline gives its denoiser timesteps of its own."""
    one, call, times = build(name), {"num_inference_steps": 4}, list[tuple[int, ...]]()
    modulations, step_in, steps = TinyGuide.modulations, GuidedPass._step_in, list[int | None]()

    def counted(self: TinyGuide, time: torch.Tensor, *given: Any) -> Any:
        times.append(tuple(time.shape))
        return modulations(self, time, *given)

    def found(self: GuidedPass, timestep: torch.Tensor, schedule: torch.Tensor) -> int | None:
        steps.append(step_in(self, timestep, schedule))
        return steps[-1]

    monkeypatch.setattr(TinyGuide, "modulations", counted)
    monkeypatch.setattr(GuidedPass, "_step_in", found)
    with guide(name).attached(one.pipe):
        made = one.latents(**call)
    # a scheduler that is not told where it begins counts from its first step on
    assert steps[-4] in (None, 0)
    assert steps[-3:] == [1, 2, 3]
    assert times == [*[(2,)] * (steps[-4] is None), (4, 2)]
    monkeypatch.setattr(GuidedPass, "_scheduled", at_each_step)
    with guide(name).attached(one.pipe):
        torch.testing.assert_close(one.latents(**call), made, rtol=1e-3, atol=1e-4)


def at_each_step(self: GuidedPass, call: Any, number: int, scale: Any, times: Any) -> Any:
    """In place of a table."""
    n = len(call.latents)
    time = times.time(torch.as_tensor(call.timestep)).reshape(-1).expand(n)
    return self._inputs(call, time, torch.full((n,), float(scale))), None
