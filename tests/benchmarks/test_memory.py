"""The memory of sampling and training steps: computed on fake tensors, and of real ones."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.command import training_table
from benchmarks.measure import ShapesResult, measure_shape
from benchmarks.memory import (
    WEIGHTS,
    TensorMemory,
    TrainingStep,
    largest,
    largest_batches,
    pipeline_parts,
    sampling_bytes,
    step_bytes,
    stored_bytes,
    training_memory,
    training_parts,
)
from benchmarks.shapes import SHAPES, Shape
from benchmarks.step import SamplingStep
from pilotfish.guides.tiny_layers import LowRank, Path, low_rank
from tests.benchmarks.small import LARGER, SMALL, SMALL_LUMINA2, SMALL_SD3, SMALL_XL

HALF = torch.bfloat16


def test_live_tensors_are_counted_and_freed_ones_are_not() -> None:
    with TensorMemory() as memory:
        kept = torch.zeros(1000)
        view = kept[10:]
        torch.zeros(500).add_(1)
        more = kept + 1
        assert (memory.current, memory.peak) == (8000, 8000)
        del more
        assert memory.current == 4000
        del kept
        assert memory.current == 4000  # a view holds it
        del view
    assert (memory.current, memory.peak) == (0, 8000)


def test_the_count_does_not_depend_on_the_garbage_collector() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.it, self.tensor = self, torch.zeros(1000)

    before = gc.isenabled()
    with TensorMemory() as memory:
        for _ in range(3 * gc.get_threshold()[0]):
            Cycle()
        assert memory.current == memory.peak == 3 * gc.get_threshold()[0] * 4000
    assert gc.isenabled() == before


@given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=3), st.integers(0, 3000))
def test_the_largest_fits_and_one_more_does_not(first: int, steps: list[int], memory: int) -> None:
    def needed(n: int) -> float:
        rounds, rest = divmod(n, len(steps))
        return first + rounds * sum(steps) + sum(steps[:rest])

    n = largest(needed, memory)
    assert memory < needed(n + 1)
    assert n == 0 or needed(n) <= memory


TRANSFORMERS = (SMALL_SD3, SMALL_LUMINA2)


@pytest.mark.parametrize("shape", [SMALL, SMALL_XL, *TRANSFORMERS])
def test_a_step_on_fake_tensors_takes_what_a_real_step_takes(shape: Shape) -> None:
    found = sampling_bytes(shape, torch.float32, 3)
    assert found.keys() >= {"none", "cfg", *shape.guides}
    with TensorMemory() as memory:
        step = SamplingStep(shape, torch.device("cpu"), torch.float32, known_schedule=False)
        for mode in ("none", "cfg", *shape.guides):
            memory.peak = before = memory.current
            step.run(mode, 3)
            guide = step.guides[mode].parameters() if mode in step.guides else ()
            weights = sum(p.nbytes for p in [*step.denoiser.parameters(), *guide])
            assert found[mode] == weights + memory.peak - before, mode


def test_a_low_rank_addition_holds_two_maps_at_most() -> None:
    network, x = LowRank(8, 4, 64), torch.zeros(1, 8, 32, 32)
    path = Path(network.down[None], torch.zeros(1, 64, 1), network.up[None])
    kernel, one = network.kernel(), 64 * 32 * 32 * 4
    with torch.no_grad(), TensorMemory() as memory:
        low_rank(x, torch.zeros(1, 4, 32, 32), path, kernel)
    assert 2 * one <= memory.peak < 2.5 * one


def test_cfg_holds_half_as_many_images_and_a_guide_nearly_all() -> None:
    needed = step_bytes(LARGER, torch.float16, "none", 12)
    assert step_bytes(LARGER, torch.float16, "cfg", 6) == needed
    found = largest_batches(LARGER, torch.float16, needed + 100, reserved=100)
    assert (found["none"], found["cfg"]) == (12, 6)
    assert 9 < found["tiny"] < 12


@pytest.mark.parametrize(
    ("shape", "guide_type"),
    [(SMALL, "tiny"), (SMALL_XL, "tiny"), (SMALL_XL, "full"), (SMALL_SD3, "tiny")],
)
def test_training_on_fake_tensors_takes_what_real_training_takes(
    shape: Shape, guide_type: str
) -> None:
    parts = training_parts(shape, guide_type, HALF, 2)
    assert parts == training_parts(shape, guide_type, HALF, 2, fake=False)
    assert parts["activations"] > 0
    step = TrainingStep(shape, guide_type, torch.device("cpu"), HALF, 2)
    step.backward()
    base = list(step.sampling.denoiser.parameters())
    assert parts["denoiser"] == sum(p.nbytes for p in base)
    assert {p.dtype for p in base} == {HALF}
    guide = list(step.guide.parameters())
    assert {p.dtype for p in guide} == {p.grad.dtype for p in guide if p.grad is not None}
    assert {p.dtype for p in guide} == {torch.float32}
    assert parts["moments"] == 2 * sum(p.nbytes for p in guide)


def test_checkpointing_and_half_precision_take_less() -> None:
    most = training_parts(LARGER, "tiny", torch.float32, 4, checkpointing=False)
    less = training_parts(LARGER, "tiny", torch.float32, 4)
    least = training_parts(LARGER, "tiny", HALF, 4)
    assert less["activations"] < 0.8 * most["activations"]
    assert least["activations"] < less["activations"]  # the guide's own stay float32
    assert least["denoiser"] == less["denoiser"] / 2


def test_quantised_weights_take_less() -> None:
    """As counted from the parameters of a real one: every matrix of the blocks is linear."""
    stored = {name: stored_bytes(SMALL_SD3, HALF, name)[0] for name in WEIGHTS}
    denoiser = SMALL_SD3.denoiser(**SMALL_SD3.config).to(HALF)
    assert stored[""] == sum(p.nbytes for p in denoiser.parameters())
    linear = sum(m.weight.numel() for m in denoiser.modules() if isinstance(m, torch.nn.Linear))
    assert stored["nf4"] == stored[""] - linear * (2 - 0.5 - 4 / 64)
    denoiser.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=HALF)
    assert stored["fp8"] == sum(p.nbytes for p in denoiser.parameters()) < stored[""]
    found = {
        name: training_memory("sd35-medium", SMALL_SD3, "tiny", command="", weights=name)
        for name in WEIGHTS
    }
    for name, memory in found.items():
        assert memory.parts["denoiser"] == stored[name]
        assert memory.parts.get("layer in use", 0.0) == stored_bytes(SMALL_SD3, HALF, name)[1]
        saved = stored[""] - stored[name] - memory.parts.get("layer in use", 0.0)
        assert memory.sampling["cfg"] == found[""].sampling["cfg"] - saved
    with pytest.raises(ValueError, match="counted, not measured: add --count_only"):
        training_memory("sd35-medium", SMALL_SD3, "tiny", command="", weights="fp8", measured=True)


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", 123_060_480), ("sd21", 340_387_840), ("sdxl", 817_720_320)]
)
def test_text_encoders_are_the_published_ones(name: str, published: int) -> None:
    assert pipeline_parts(name, HALF) == {"text encoders": 2 * published, "vae": 4 * 83_653_863}
    assert name in SHAPES


@pytest.mark.parametrize(
    ("name", "text", "vae"),
    [
        ("sd35-large", 5.58, 83.8), ("qwen-image", 8.29, 126.9), ("z-image", 4.02, 83.8),
        ("lumina2", 2.61, 83.8), ("sana", 2.61, 312.3), ("wan-14b", 5.68, 126.9),
    ],
)  # fmt: skip
def test_other_parts_of_transformer_pipelines_are_the_published_ones(
    name: str, text: float, vae: float
) -> None:
    parts = pipeline_parts(name, HALF)
    assert parts["text encoders"] / 2e9 == pytest.approx(text, 0.01)
    assert parts["vae"] / 4e6 == pytest.approx(vae, 0.01)


def test_a_real_step_updates_the_guide_and_is_shown() -> None:
    step = TrainingStep(SMALL, "tiny", torch.device("cpu"), HALF, 1)
    step.prepare()
    before = [p.detach().clone() for p in step.guide.parameters()]
    step.run()
    after = list(step.guide.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    measured = training_memory("sd15", SMALL, "tiny", command="it", measured=True)
    assert measured.peak_bytes > 2**20
    assert measured.seconds > 0
    computed = training_memory("sd15", SMALL, "full", command="it")
    assert math.isnan(computed.peak_bytes)
    shape = measure_shape(SMALL, command="it", batch_sizes=())
    shape.training.update(tiny=measured, full=computed)
    result = ShapesResult({"small": shape})
    assert str(ShapesResult.from_json(result.to_json())) == str(result)
    console = Console(width=200, record=True)
    console.print(training_table(result))
    shown = console.export_text()
    assert "small, tiny" in shown
    assert "activations" in shown


def test_another_guide_type_is_refused() -> None:
    with pytest.raises(ValueError, match="sd15 takes tiny, full, not agd"):
        training_memory("sd15", SMALL, "agd", command="it")
