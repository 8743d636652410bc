"""Full-size denoisers, counted without memory, and small ones timed for real."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console

from benchmarks.shapes import (
    SHAPES,
    Shape,
    ShapeResult,
    ShapesResult,
    Steps,
    measure_shape,
    timed_as,
)
from pilotfish.evaluation.table import shapes_table

SMALL = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}  # fmt: skip
SMALL_XL = SMALL | {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 1280,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "published"), [("sd15", 859_520_964), ("sd21", 865_910_724), ("sdxl", 2_567_463_684)]
)
def test_the_shapes_are_those_of_the_published_models(name: str, published: int) -> None:
    counted = measure_shape(SHAPES[name], command="counted", batch_sizes=())
    assert counted.parameters == published
    assert counted.guides["tiny"].share < 0.01
    assert 1 < counted.flops["tiny"] / counted.flops["plain"] < 1.02
    assert counted.flops["cfg"] == 2 * counted.flops["plain"]
    assert counted.guides["full"].share > 0.3
    assert not counted.cfg_over


@pytest.mark.parametrize("config", [SMALL, SMALL_XL])
def test_what_is_counted_without_memory_is_what_is_computed(config: dict[str, object]) -> None:
    meta, real = (
        Steps(Shape(config), torch.device(device), torch.float32) for device in ("meta", "cpu")
    )
    for way in real.ways:
        assert meta.flops(way) == real.flops(way) > 0


def saved_and_shown(made: ShapeResult, tmp_path: Path) -> str:
    """The table of a result that was saved and loaded."""
    result = ShapesResult({timed_as("small", made.precision, made.compiled): made})
    result.save(tmp_path / "shapes.json")
    assert ShapesResult.load(tmp_path / "shapes.json") == result
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(shapes_table(result))
    return console.export_text()


def test_it_is_timed_in_every_way_saved_and_shown(tmp_path: Path) -> None:
    lines: list[str] = []
    made = measure_shape(
        Shape(SMALL), command="timed", batch_sizes=(1, 2), rounds=1, notice=lines.append
    )
    assert set(made.cfg_over) == set(made.peak_bytes) == {"1", "2"}
    assert set(made.cfg_over["1"]) == {"plain", "tiny", "full"}
    assert all(value > 0 for row in made.seconds.values() for value in row.values())
    assert all(value > 2**20 for row in made.peak_bytes.values() for value in row.values())
    assert len(lines) == 3
    assert "CFG" in saved_and_shown(made, tmp_path)


def test_a_compiled_denoiser_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    quickly = partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(UNet2DConditionModel, "compile", quickly)
    made = measure_shape(
        Shape(SMALL), command="timed", rounds=1, guides=["tiny"], compiled=True, notice=print
    )
    assert made.compiled
    assert set(made.seconds["1"]) == {"plain", "cfg", "tiny"}
    assert set(made.guides) == {"tiny", "full"}
    assert "small, compiled" in saved_and_shown(made, tmp_path)


def test_no_round_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one round"):
        measure_shape(Shape(SMALL), command="none", rounds=0)
