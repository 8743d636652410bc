"""The parts of a protocol: schedulers, scores from disk, shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from baselines import DeltaReuse
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import ModelSource
from pilotfish.evaluation.metrics import ClipScore
from pilotfish.evaluation.protocols import methods as rows
from pilotfish.evaluation.protocols.definitions import Case
from pilotfish.evaluation.protocols.results import ProtocolResult
from pilotfish.evaluation.protocols.run import ProtocolSettings, run_protocol
from pilotfish.evaluation.protocols.scores import (
    Cosines,
    ReferenceFID,
    Scorers,
    pickscore_factor,
    read_images,
)
from pilotfish.evaluation.protocols.shares import share_kept
from pilotfish.guides import Guide, TinyGuide
from tests.pipelines.pipelines import build

CASES = [Case("a cat"), Case("dog"), Case("red cat")]


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def test_the_solver_runs_on_the_noise_of_the_model(make_pipe: Callable[[str], Any]) -> None:
    pipe = make_pipe("v_prediction")
    before = pipe.scheduler
    rows.use_protocol_scheduler(pipe)
    config = pipe.scheduler.config
    assert (config.algorithm_type, config.solver_order) == ("dpmsolver++", 2)
    assert config.prediction_type == "v_prediction"
    assert torch.equal(pipe.scheduler.alphas_cumprod, before.alphas_cumprod)
    assert rows.default_guidance_scale(pipe) == 7.5
    assert "_use_default_values" not in rows.scheduler_facts(pipe), "its order is by chance"


def test_a_flow_model_keeps_its_scheduler(
    scorer: Scorer, randomise: Callable[[Guide], Guide], tmp_path: Path
) -> None:
    pipe = build("SD3", alone=True).pipe
    guide = randomise(TinyGuide.for_denoiser(pipe.transformer, "flow"))
    settings = ProtocolSettings("drawbench", CASES, num_inference_steps=2)
    found = run_protocol(
        settings, {"sd3": ModelSource(lambda: pipe)}, {"mine": guide},
        rows.methods({"mine": guide}, (0,), (1,), DeltaReuse, 2),
        Scorers(clip_score=Cosines(scorer, 100.0)), tmp_path, command="",
    )  # fmt: skip
    assert isinstance(found, ProtocolResult)
    assert {name: row.passes for name, row in found.models["sd3"].items()} == {
        "none": 2, "cfg": 4, "mine-refresh-0": 2, "delta-reuse-1": 3,
    }  # fmt: skip
    assert found.run.schedulers == {"sd3": "FlowMatchEulerDiscreteScheduler"}
    assert found.run.guidance_scale == 4.5


def test_a_rule_for_other_denoisers_is_left_out(
    make_pipe: Callable[[str], Any], scorer: Scorer, tmp_path: Path
) -> None:
    none, cfg, reuse = rows.methods({}, (), (1,), DeltaReuse, 2)
    assert reuse.refusal(make_pipe("epsilon")) == cfg.refusal(make_pipe("epsilon")) == ""
    refusal = reuse.refusal(build("AuraFlow", alone=True).pipe)
    assert refusal.startswith("delta reuse is made for Stable Diffusion")

    def refuse() -> Any:
        raise ValueError("made for others")

    left_out: list[str] = []
    found = run_protocol(
        ProtocolSettings("drawbench", CASES, num_inference_steps=2),
        {"sd": ModelSource(lambda: make_pipe("epsilon"))}, {},
        [none, cfg, replace(reuse, make=refuse)],
        Scorers(clip_score=Cosines(scorer, 100.0)), tmp_path, command="", log=left_out.append,
    )  # fmt: skip
    assert isinstance(found, ProtocolResult)
    assert [*found.models["sd"]] == ["none", "cfg"]
    assert left_out == ["sd: delta reuse, refresh=1 is left out: made for others"]


def test_a_guide_for_few_steps_is_refused(guide: Guide, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(guide), "times", (0.9, 0.4))
    with pytest.raises(ValueError, match="guide few was distilled to 2 steps"):
        rows.methods({"few": guide}, (0,), (), None, 20)


def test_scores_from_disk_are_those_of_the_models(scorer: Scorer, real: Path) -> None:
    files, texts = sorted(real.glob("*.png")), list("abcdef")
    images = read_images(files)
    found = Cosines(scorer, 100.0).measure(files, texts, silent).values
    score = ClipScore(scorer)
    score.update(images, texts)
    assert max(0.0, np.mean(found)) == pytest.approx(score.compute(), abs=1e-4)

    tokens = scorer.tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        logits = scorer.model(tokens.input_ids, scorer.prepare(images)).logits_per_image
    pickscore = Cosines(scorer, pickscore_factor(scorer)).measure(files, texts, silent).values
    assert pickscore == pytest.approx(logits.diagonal().tolist(), abs=1e-4)


def test_real_images_are_cropped_to_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), dtype=np.uint8)
    pixels[:, 4:8] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "high.png")
    files = [tmp_path / "wide.png", tmp_path / "high.png"]
    assert (read_images(files, (4, 4)) == 1).all()
    assert read_images(files, (8, 8)).shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="differ in size"):
        read_images(files)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: cannot identify"):
        read_images([tmp_path / "text.png"])


def test_fid_needs_real_images_and_weights(tmp_path: Path, real: Path) -> None:
    with pytest.raises(ValueError, match="fewer than two images"):
        ReferenceFID(tmp_path / "gone.pth", tmp_path)
    with pytest.raises(ValueError, match="no Inception weights"):
        ReferenceFID(tmp_path / "gone.pth", real)


def test_the_share_of_the_gain() -> None:
    prompt = torch.arange(40) // 2
    noise = torch.Generator().manual_seed(0)
    none = torch.randn(40, generator=noise, dtype=torch.float64)
    cfg = none + 2 + 0.1 * torch.randn(40, generator=noise, dtype=torch.float64)
    kept, interval = share_kept(none, cfg, none + 0.75 * (cfg - none), prompt)
    assert kept == pytest.approx(0.75)
    assert (interval.low, interval.high) == pytest.approx((0.75, 0.75))
    mixed = torch.where(prompt % 2 == 0, none, cfg)
    kept, interval = share_kept(none, cfg, mixed, prompt)
    assert interval.low < kept < interval.high
    assert math.isnan(share_kept(cfg, none, none, prompt)[0]), "CFG gains nothing"


def test_settings(make_pipe: Callable[[str], Any]) -> None:
    settings = ProtocolSettings("negative-prompts", [Case("a", "b"), Case("c", "d")])
    assert settings.count == 32
    cases, seeds = replace(settings, samples=3, seed=5).spread
    assert [case.prompt for case in cases] == ["a", "c", "a"]
    assert seeds == [5, 6, 7]
    other = type("OtherPipeline", (), {})()
    with pytest.raises(ValueError, match="no guidance scale is known for a OtherPipeline"):
        rows.default_guidance_scale(other)
