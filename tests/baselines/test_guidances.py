"""Guidances beside CFG, on the bundled base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baselines import guidances
from baselines.guidances import GuidancesConfig, GuidancesResult, parse
from pilotfish import bundled
from pilotfish.evaluation.results import Scores
from pilotfish.guidances import Guidance
from pilotfish.guides import TinyGuide


def test_a_guidance_is_read_from_its_text() -> None:
    layers = ("mid_block.attentions.0.transformer_blocks.0", "transformer_blocks.7")
    assert parse("cfg") == (Guidance(), None)
    assert parse("apg:eta=0.5,norm_threshold=3@2.5") == (
        Guidance("apg", eta=0.5, norm_threshold=3),
        2.5,
    )
    assert parse(f"pag:degraded_layers={'+'.join(layers)}")[0].degraded_layers == layers
    assert parse("autoguidance:weak_model=runs/weak")[0].weak_model == "runs/weak"
    for wrong, words in (
        ("agp", "must be one of"),
        ("apg:eat=1", "settings eta"),
        ("cfg:eta=1", "eta"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(wrong)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> GuidancesResult:
    """Of two images, and a fresh guide that changes nothing but in its refreshes."""
    folder = tmp_path_factory.mktemp("guidances")
    torch.manual_seed(0)
    taught = Guidance("slg", degraded_scale=0.25).plain()
    unet = bundled.load_model("base").unet
    TinyGuide.for_denoiser(unet, "v_prediction", rank=2, teacher=taught).save_pretrained(
        folder / "guide"
    )
    config = GuidancesConfig(
        rules=("apg:eta=1@3", "slg:degraded_scale=0.25@3"), scales=(3.0,),
        guides=(f"own={folder / 'guide'}",), refresh=(0, 2), samples=2, num_inference_steps=2,
        output=str(folder / "found.json"),
    )  # fmt: skip
    made = guidances.measure(config, "a command")
    made.save(config.output)
    assert GuidancesResult.load(Path(config.output)) == made
    return made


def test_passes_are_counted_and_a_guide_stands_beside_what_it_was_taught(
    found: GuidancesResult,
) -> None:
    none, cfg, apg, slg, guide, refreshed = found.points
    assert [p.passes for p in found.points] == [2, 4, 4, 6, 2, 6]
    assert [p.name for p in found.points] == ["none", "cfg", "apg", "slg", "slg", "slg"]
    for one, other in ((cfg, apg), (none, guide), (slg, refreshed)):
        assert other.scores.cosine == pytest.approx(one.scores.cosine, abs=1e-4)
    assert slg.scores.cosine != pytest.approx(cfg.scores.cosine, abs=1e-4)
    lines = guidances.table(found).splitlines()
    assert len(lines) == 2 + 6
    assert "own, refresh 2" in lines[-1]


def test_the_best_of_each_is_nearest_at_no_lower_top5(found: GuidancesResult) -> None:
    def points(name: str, *scores: tuple[float, float]) -> list[guidances.GuidancePoint]:
        one = next(p for p in found.points if p.name == name and not p.guide)
        return [replace(one, w=2.0 + i, scores=Scores(0.5, *s)) for i, s in enumerate(
            (top5, 0.5, fd) for top5, fd in scores)]  # fmt: skip

    made = replace(found, points=[
        found.points[0], *points("cfg", (0.7, 3.0), (0.8, 2.0), (0.9, 4.0)),
        *points("apg", (0.7, 1.0), (0.8, 1.5), (0.9, 1.8)), *points("slg", (0.6, 1.0), (0.7, 9.0)),
    ])  # fmt: skip
    assert {name: p.w for name, p in made.best().items()} == {"cfg": 3.0, "apg": 3.0, "slg": 3.0}
