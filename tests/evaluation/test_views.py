"""Plots, grids and the report: their numbers, sizes and pixels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pilotfish import cli
from pilotfish.evaluation import plots
from pilotfish.evaluation.grids import (
    contact_sheet,
    draw_model,
    draw_models,
    draw_scales,
    model_grid,
    scales_grid,
    wide_grid,
)
from pilotfish.evaluation.images import ModelSource
from pilotfish.evaluation.report import render, write
from pilotfish.evaluation.results import Result
from pilotfish.guides import Guide

ROWS = [{"step": 0, "loss": 1.0}, {"step": 10, "loss": 0.5, "guidance_error": 0.6}]


def columns(n: int) -> dict[str, torch.Tensor]:
    shades = {"none": -1.0, "cfg": 0.0, "guided": 1.0}
    return {mode: torch.full((n, 3, 16, 16), shade) for mode, shade in shades.items()}


def test_a_contact_sheet_holds_every_image_and_no_prompt() -> None:
    sheet = contact_sheet(torch.stack([torch.full((3, 8, 8), v) for v in (-1.0, 0.0, 1.0)]), 2)
    colours = {colour for _, colour in sheet.getcolors(10_000)}
    assert {(0, 0, 0), (255, 255, 255)} < colours
    assert sheet.width < sheet.height
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet(torch.empty(0, 3, 8, 8))


def test_a_line_for_each_model_and_one_for_no_guide(result: Result) -> None:
    for draw in (plots.guidance_error_over_scale, plots.guidance_error_over_time):
        (axes,) = draw(result).axes
        assert [line.get_label() for line in axes.lines] == ["base", "watercolour", "no guide"]
    axes = plots.guidance_error_over_scale(result).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[2.0, 0.2], [7.0, 0.4]]


def test_time_runs_from_noise_to_image(result: Result) -> None:
    left, right = plots.guidance_error_over_time(result).axes[0].get_xlim()
    assert left > right


def test_bars_are_shares_of_cfg(result: Result) -> None:
    (axes,) = plots.cost_bars(result.cost).axes
    guided = axes.containers[2]
    heights = [bar.get_height() for bar in guided]
    assert heights == pytest.approx([0.51, 1 / 1.6, 1 / 1.75])


def test_the_training_curve_takes_rows_with_gaps(tmp_path: Path) -> None:
    figure = plots.training_curve(ROWS)
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [[10.0, 0.6]]
    assert right.lines[0].get_xydata().tolist() == [[0.0, 1.0], [10.0, 0.5]]
    plots.save(figure, tmp_path / "deep" / "training.png")
    assert Image.open(tmp_path / "deep" / "training.png").width > 500
    with pytest.raises(ValueError, match="neither loss nor guidance_error"):
        plots.training_curve([{"step": 1}])


def test_a_grid_shows_every_image_in_its_place() -> None:
    grid = model_grid(["cat", "a very long prompt of many words indeed"], columns(2))
    shades = {-1: (0, 0, 0), 0: (128, 128, 128), 1: (255, 255, 255)}
    right = grid.width - 8 - 16
    for row in (0, 1):
        y = grid.height - 8 - 16 - (1 - row) * 40
        found = [grid.getpixel((right - (2 - c) * 40, y)) for c in range(3)]
        assert found == [shades[-1], shades[0], shades[1]]


def test_images_are_enlarged() -> None:
    small, large = (model_grid(["cat"], columns(1), scale=n) for n in (2, 3))
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


def test_a_wide_grid_is_the_grids_side_by_side() -> None:
    one, two = (wide_grid(["cat"], {n: columns(1) for n in names}) for names in ("a", "ab"))
    assert two.height == one.height
    assert two.width - one.width == 3 * (32 + 8) + 8


def test_a_grid_needs_an_image_for_every_prompt() -> None:
    with pytest.raises(ValueError, match="no guidance: 1 images of 2 rows"):
        model_grid(["cat", "a"], columns(1))
    with pytest.raises(ValueError, match="at least one row"):
        model_grid([], columns(0))


def test_models_are_drawn_in_three_columns(
    pipe: Any, moved: Guide, models: dict[str, ModelSource]
) -> None:
    settings = {"num_inference_steps": 2, "seed": 3}
    drawn = draw_models(models, moved, ["cat", "a", "b"], batch_size=2, **settings)
    assert set(drawn) == set(models)
    alone = draw_model(pipe, moved, ["cat", "a", "b"], batch_size=3, **settings)
    for mode, images in drawn["base"].items():
        assert images.shape == (3, 3, 16, 16)
        assert torch.allclose(images, alone[mode], atol=1e-3)


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
        settings = {"seed": 5, "guidance_scale": w, "num_inference_steps": 2}
        alone = draw_model(pipe, moved, ["cat"], **settings)
        assert torch.allclose(rows["cat, CFG"][i], alone["cfg"][0], atol=1e-3)
        assert torch.allclose(rows["cat, guided"][i], alone["guided"][0], atol=1e-3)
    made = Image.open(tmp_path / "out" / "scales.png")
    assert made.size == scales_grid(scales, {"base": rows}).size


@pytest.fixture(scope="module")
def page(result: Result) -> str:
    grids = {"base": model_grid(["cat"], columns(1))}
    return render(result, fresh=result, grids=grids, training=ROWS)


def test_the_report_stands_alone(page: str) -> None:
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)
    addresses = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(addresses) == 1 + 2 * 4
    assert all(a.startswith("data:image/png;base64,") for a in addresses)


def test_the_report_has_every_model_and_how_to_repeat_it(page: str, result: Result) -> None:
    for word in (*result.models, "bundled", "fresh", result.run.command, "a processor", "torch 2"):
        assert word in page


def test_without_a_fresh_guide_there_is_one_row_for_each_model(result: Result) -> None:
    page = render(result)
    assert "fresh" not in page
    assert page.count('<td class="text model">base</td>') == 2  # agreement and scores


def test_what_a_user_names_is_text_and_not_markup(result: Result, tmp_path: Path) -> None:
    odd = Result({"<b>x</b>": result.models["base"]}, result.guide, result.cost, result.run)
    write(tmp_path / "deep" / "report.html", odd)
    text = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;x" in text
    assert "<b>x</b>" not in text
