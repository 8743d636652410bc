"""Plots and grids: their numbers, sizes and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pilotfish import cli
from pilotfish.evaluation import plots
from pilotfish.evaluation.grids import draw_models, draw_scales, scales_grid, sheet
from pilotfish.evaluation.images import ModelSource, guidance_modes
from pilotfish.evaluation.results import Result
from pilotfish.guides import Guide
from pilotfish.pipelines import Refreshed


def columns(n: int) -> dict[str, torch.Tensor]:
    shades = {"none": -1.0, "cfg": 0.0, "guided": 1.0}
    return {mode: torch.full((n, 3, 16, 16), shade) for mode, shade in shades.items()}


def test_a_line_for_each_model_and_one_for_no_guide(result: Result, tmp_path: Path) -> None:
    figure = plots.guidance_errors(result)
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["base", "watercolour", "no guide"]
    by_w, by_time = figure.axes
    assert by_w.lines[0].get_xydata().tolist() == [[2.0, 0.2], [7.0, 0.4]]
    left, right = by_time.get_xlim()
    assert left > right, "time does not run from noise to image"
    plots.save(figure, tmp_path / "deep" / "errors.png")
    assert Image.open(tmp_path / "deep" / "errors.png").width > 500


def test_a_grid_shows_every_image_in_its_place() -> None:
    grid = sheet(["cat", "a very long prompt of many words indeed"], {"": columns(2)})
    shades = {-1: (0, 0, 0), 0: (128, 128, 128), 1: (255, 255, 255)}
    right = grid.width - 8 - 16
    for row in (0, 1):
        y = grid.height - 8 - 16 - (1 - row) * 40
        found = [grid.getpixel((right - (2 - c) * 40, y)) for c in range(3)]
        assert found == [shades[-1], shades[0], shades[1]]


def test_images_are_enlarged() -> None:
    small, large = (sheet(["cat"], {"": columns(1)}, scale=n) for n in (2, 3))
    assert (large.width - small.width, large.height - small.height) == (3 * 16, 16)


def test_a_grid_by_guidance_scale_shows_every_image_in_its_place() -> None:
    shades = torch.tensor([[-1.0, -0.5], [0.0, 0.5]])[..., None, None, None]
    rows = dict(zip(("CFG", "guided"), shades.expand(2, 2, 3, 16, 16), strict=True))
    grid = scales_grid([1.0, 4.0], {"": rows})
    right, bottom = grid.width - 8 - 16, grid.height - 8 - 16
    found = [[grid.getpixel((right - x, bottom - y))[0] for x in (40, 0)] for y in (40, 0)]
    assert found == [[0, 64], [128, 191]]
    with pytest.raises(ValueError, match="CFG: 2 images of 3 guidance scales"):
        scales_grid([1.0, 2.0, 3.0], {"": rows})
    for models in ({}, {"": {}}):
        with pytest.raises(ValueError, match="at least one row and one column"):
            scales_grid([], models)
    two = scales_grid([1.0, 4.0], {"base": rows, "fine-tune": rows})
    assert two.width - grid.width == 2 * (32 + 8) + 8


def test_models_stand_side_by_side() -> None:
    one, two = (sheet(["cat"], {n: columns(1) for n in names}) for names in ("a", "ab"))
    assert two.height == one.height
    assert two.width - one.width == 3 * (32 + 8) + 8


def test_a_grid_needs_an_image_for_every_prompt() -> None:
    with pytest.raises(ValueError, match="none: 1 images of 2 rows"):
        sheet(["cat", "a"], {"": columns(1)})
    with pytest.raises(ValueError, match="at least one row"):
        sheet([], {"": columns(0)})


def test_models_are_drawn_in_every_column(moved: Guide, models: dict[str, ModelSource]) -> None:
    columns = {"plain": (1.0, None), "CFG": (4.0, None), "both": (4.0, Refreshed(moved, 2))}
    drawn = draw_models(models, columns, ["cat", "a", "b"], num_inference_steps=2)
    assert set(drawn) == set(models)
    for of_model in drawn.values():
        assert list(of_model) == list(columns)
        assert of_model["CFG"].shape == (3, 3, 16, 16)
        assert torch.allclose(of_model["both"], of_model["CFG"], atol=1e-3)
        assert not torch.allclose(of_model["plain"], of_model["CFG"], atol=1e-3)


def test_the_command_draws_cfg_above_guided(pipe: Any, moved: Guide, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "base")
    moved.save_pretrained(tmp_path / "guide")
    scales = [2.0, 4.0]
    flags = (
        "--guide", str(tmp_path / "guide"), "--models", str(tmp_path / "base"),
        "--guidance_scales", "2", "4", "--num_inference_steps", "2", "--seed", "5", "-p", "cat",
        "--scales", str(tmp_path / "out" / "scales.png"),
    )  # fmt: skip
    assert cli.main(["inspect", *flags]) == 0
    rows = draw_scales(pipe, moved, ["cat"], scales, seed=5, num_inference_steps=2)
    assert list(rows) == ["cat, CFG", "cat, guided"]
    for i, w in enumerate(scales):
        alone = draw_models(
            {"base": ModelSource(lambda: pipe)}, guidance_modes(moved, w), ["cat"], seed=5,
            num_inference_steps=2,
        )["base"]  # fmt: skip
        assert torch.allclose(rows["cat, CFG"][i], alone["cfg"][0], atol=1e-3)
        assert torch.allclose(rows["cat, guided"][i], alone["guided"][0], atol=1e-3)
    made = Image.open(tmp_path / "out" / "scales.png")
    assert made.size == scales_grid(scales, {"base": rows}).size
