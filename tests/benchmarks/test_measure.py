"""Full-size denoisers, counted without memory, and small ones timed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.command import shapes_table
from benchmarks.measure import ShapeResult, ShapesResult, call_speedup, measure_shape, result_key
from benchmarks.report import shapes_markdown
from benchmarks.shapes import SHAPES, Shape
from benchmarks.step import SamplingStep
from pilotfish.evaluation.speed import denoiser_flops
from tests.benchmarks.small import SMALL, SMALL_LUMINA2, SMALL_SD3, SMALL_XL

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)]
)
def test_shapes_are_those_of_the_published_models(name: str, published: int) -> None:
    step = SamplingStep(SHAPES[name], torch.device("meta"), torch.float32)
    assert sum(p.numel() for p in step.denoiser.parameters()) == published
    sizes = step.guide_sizes()
    assert sizes["tiny"].share < 0.01
    assert sizes["full"].share > 0.3


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("sd35-medium", 2.24), ("sd35-large", 8.06), ("qwen-image", 20.43), ("z-image", 6.15),
        ("lumina2", 2.61), ("sana", 1.60), ("wan-1.3b", 1.42), ("wan-14b", 14.29),
    ],
)  # fmt: skip
def test_transformers_are_the_published_ones(name: str, published: float) -> None:
    step = SamplingStep(SHAPES[name], torch.device("meta"), torch.bfloat16)
    assert sum(p.numel() for p in step.denoiser.parameters()) / 1e9 == pytest.approx(
        published, 0.01
    )
    assert 0.002 < step.guide_sizes()["tiny"].share < 0.01


def test_a_full_size_shape_is_counted() -> None:
    counted = measure_shape(SHAPES["sd15"], command="counted", batch_sizes=())
    assert 1 < counted.flops["tiny"] / counted.flops["none"] < 1.02
    assert counted.flops["cfg"] == 2 * counted.flops["none"]
    assert not counted.speedup


@pytest.mark.parametrize("shape", [SMALL, SMALL_XL, SMALL_SD3, SMALL_LUMINA2])
def test_flops_on_the_meta_device_are_those_on_the_cpu(shape: Shape) -> None:
    meta, real = (SamplingStep(shape, torch.device(d), torch.float32) for d in ("meta", "cpu"))
    for mode in real.modes:
        assert meta.flops(mode) == real.flops(mode) > 0


def test_a_step_after_a_refresh_costs_little_more() -> None:
    step = SamplingStep(SMALL, torch.device("meta"), torch.float32)
    assert step.refreshed == ("tiny, refreshed",)
    assert 1 < step.flops("tiny, refreshed") / step.flops("tiny") < 1.05


def test_what_a_call_makes_once_is_spread_over_its_steps() -> None:
    step, guide = SamplingStep(SMALL_SD3, torch.device("meta"), torch.float32), "tiny-cached"
    first, two = (denoiser_flops(step, partial(step.run, guide, 1, n)) for n in (1, 2))
    assert two - first < first, "the negative prompt's stream is made at the first step alone"
    assert step.flops(guide) == int((first + 24 * (two - first)) / 25)
    assert step.flops("cfg") == 2 * step.flops("none")


def test_a_call_lies_between_cfg_and_its_steps() -> None:
    assert call_speedup(2.0, 0, 25) == 2
    assert call_speedup(2.0, 25, 25) == 1
    assert call_speedup(2.0, 3, 25) == pytest.approx(50 / 28)


def shown_after_saving(found: ShapeResult, tmp_path: Path) -> str:
    """The table of a result that was saved and loaded."""
    result = ShapesResult({result_key("small", found.dtype, found.compiled): found})
    result.save(tmp_path / "shapes.json")
    assert ShapesResult.load(tmp_path / "shapes.json") == result
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(shapes_table(result))
    return console.export_text()


def test_a_shape_is_timed_in_all_modes_saved_and_shown(tmp_path: Path) -> None:
    lines: list[str] = []
    found = measure_shape(SMALL, command="timed", batch_sizes=(1, 2), rounds=1, notice=lines.append)
    assert set(found.speedup) == set(found.peak_bytes) == {"1", "2"}
    assert set(found.speedup["1"]) == {"none", "tiny", "full", "tiny, refreshed"}
    assert all(value > 0 for row in found.seconds.values() for value in row.values())
    assert all(value > 2**20 for row in found.peak_bytes.values() for value in row.values())
    assert len(lines) == 3
    assert "CFG" in shown_after_saving(found, tmp_path)


def test_images_of_another_size_are_timed(tmp_path: Path) -> None:
    found = measure_shape(SMALL_SD3, command="timed", rounds=1, side=64)
    assert found.side == 64
    assert set(found.speedup["1"]) == {
        "none",
        *(
            name + more for name in ("tiny", "tiny-cached", "tiny-sampled")
            for more in ("", ", refreshed")
        ),
    }  # fmt: skip
    assert "timed at 64 pixels" in shown_after_saving(found, tmp_path)
    step = SamplingStep(SMALL_SD3, torch.device("cpu"), torch.float32, side=64)
    assert step.latents == (16, 8, 8)
    with pytest.raises(ValueError, match="a multiple of"):
        SamplingStep(SMALL_SD3, torch.device("cpu"), torch.float32, side=65)
    with pytest.raises(ValueError, match="not for videos"):
        SamplingStep(SHAPES["wan-1.3b"], torch.device("meta"), torch.float32, side=64)
    with pytest.raises(ValueError, match="no full guide fits SD3Transformer2DModel"):
        SamplingStep(SMALL_SD3, torch.device("cpu"), torch.float32, ["full"])


def test_a_page_has_the_wall_clock_of_transformers_that_were_timed() -> None:
    counted = measure_shape(SMALL_SD3, command="count", batch_sizes=())
    timed = measure_shape(SMALL_SD3, command="time", rounds=1, dtype=torch.bfloat16)
    shapes = {"sd35-medium": counted, "sd35-large": counted}
    assert "wall clock" not in shapes_markdown(ShapesResult(shapes), unets=False)
    shapes |= {"sd35-medium, bfloat16": timed, "sd15": timed}
    text = shapes_markdown(ShapesResult(shapes), unets=False)
    rows = [line for line in text.splitlines() if "bfloat16 | 1,024 × 1,024 |" in line]
    forms = ("", ", cached stream", ", cached stream, sampled")
    for form, kind, row in zip(forms, SMALL_SD3.guides, rows, strict=True):
        speeds = [timed.speedup["1"][mode] for mode in ("none", kind)]
        assert row.startswith(f"| sd35-medium{form}, bfloat16 |")
        assert [f"{speed:.2f}" for speed in speeds] == row.split(" | ")[2:4]
    assert text.rstrip().endswith(f"Timed by `time` on {timed.machine}.")


def test_a_page_of_unets_has_the_full_guide_and_the_largest_batches() -> None:
    counted = measure_shape(SMALL, command="count", batch_sizes=())
    counted.largest_batch["float16, 24 GiB"] = {"none": 1343, "cfg": 671, "tiny": 1200, "full": 900}
    shapes = ShapesResult({"sd15": counted, "sd35-medium": counted})
    text = shapes_markdown(shapes, unets=True)
    assert "| sd15, full guide |" in text
    assert "| largest batch | sd15 |" in text
    assert "| guided, float16, 24 GiB | 1,200 |" in text
    assert "sd35-medium" not in text
    assert "sd15" not in shapes_markdown(shapes, unets=False)


def test_zero_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        measure_shape(SMALL, command="none", rounds=0)


def test_the_committed_figures_can_be_read() -> None:
    assert "sd15" in ShapesResult.load(ROOT / "results" / "shapes.json").shapes
