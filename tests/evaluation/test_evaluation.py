from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.evaluation.evaluation import evaluate, evaluate_host
from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.result import Result
from pilotfish.evaluation.sweep import sweep
from pilotfish.evaluation.ways import WAYS, three_ways, walk
from pilotfish.guides import Guide

SMALL: dict[str, Any] = {"samples": 3, "num_inference_steps": 2, "batch_size": 2}
TOLD: dict[str, Any] = {"held_out": ["cat", "a"], "guidance_scales": (4.0,)}


def test_prompts_go_round_with_new_seeds() -> None:
    assert walk(["a", "b"], 5, 10) == (list("ababa"), [10, 11, 12, 13, 14])
    with pytest.raises(ValueError, match="at least one"):
        walk([], 5, 0)


def test_few_pictures_are_of_prompts_from_the_whole_list() -> None:
    """Lists go category by category: the first few would all be animals."""
    assert walk(list("abcdefghi"), 4, 0)[0] == list("aceg")


def test_the_three_ways_start_from_the_same_noise(pipe: Any, guide: Guide) -> None:
    """A fresh guide changes nothing, so its pictures are those of no guidance, not CFG's."""
    settings = {"guidance_scale": 4.0, "num_inference_steps": 2, "batch_size": 2}
    batches = list(three_ways(pipe, guide, list("abc"), [1, 2, 3], **settings))
    assert [len(b["cfg"].prompts) for b in batches] == [2, 1]
    for batch in batches:
        assert set(batch) == set(WAYS)
        assert torch.allclose(batch["guided"].latents, batch["none"].latents, atol=1e-5)
        assert not torch.allclose(batch["cfg"].latents, batch["none"].latents, atol=1e-3)


def test_what_is_known_is_not_drawn_again(
    pipe: Any, guide: Guide, moved: Guide, judge: Judge, names: list[str], real: Path,
    batches: Callable[..., Any],
) -> None:  # fmt: skip
    settings: dict[str, Any] = {
        "prompts": names, "names": names, "pictures_folder": real, "judge": judge, **SMALL, **TOLD
    }  # fmt: skip
    known: list[Any] = []
    evaluate_host(pipe, guide, known=known, **settings)
    assert len(known) == 2
    with batches(pipe.unet) as few:
        again = evaluate_host(pipe, moved, known=known, **settings)
    with batches(pipe.unet) as all_of_them:
        alone = evaluate_host(pipe, moved, **settings)
    # one pass and two, for three pictures in two steps
    assert sum(all_of_them) - sum(few) == 3 * 3 * 2
    for part in ("guidance_error", "latent_mse_ratio", "cfg", "guided", "agreement"):
        assert getattr(again, part) == getattr(alone, part)


def test_a_fresh_guide_measures_as_no_guide(
    pipe: Any, guide: Guide, judge: Judge, names: list[str], real: Path
) -> None:
    found = evaluate_host(
        pipe, guide, prompts=names, names=names, pictures_folder=real, judge=judge, **SMALL, **TOLD
    )
    assert found.guidance_error.mean == pytest.approx(1, abs=1e-4)
    assert found.latent_mse_ratio == pytest.approx(1, abs=1e-3)
    assert found.gain_kept_cosine == pytest.approx(0, abs=1e-2)
    assert found.guided.cosine == pytest.approx(found.none.cosine, abs=1e-5)
    assert found.guided.fd_judge == pytest.approx(found.none.fd_judge, rel=1e-3)
    assert found.agreement["guided"].psnr == pytest.approx(found.agreement["none"].psnr, rel=1e-3)


def test_batches_make_no_difference(
    pipe: Any, moved: Guide, judge: Judge, names: list[str], real: Path
) -> None:
    one, three = (
        evaluate_host(
            pipe, moved, prompts=names, names=names, pictures_folder=real, judge=judge,
            **{**SMALL, "batch_size": n}, **TOLD,
        )
        for n in (1, 3)
    )  # fmt: skip
    assert one.cfg.fd_judge == pytest.approx(three.cfg.fd_judge, rel=1e-2, abs=1e-3)
    assert one.latent_mse_ratio == pytest.approx(three.latent_mse_ratio, rel=1e-3)
    assert one.guided.cosine == pytest.approx(three.guided.cosine, abs=1e-4)
    assert one.agreement["guided"].ssim == pytest.approx(three.agreement["guided"].ssim, abs=1e-3)


def test_every_host_is_measured_and_comes_back_from_json(
    hosts: dict[str, Host], moved: Guide, judge: Judge, names: list[str]
) -> None:
    told: list[tuple[str, int, int]] = []
    result = evaluate(
        hosts, moved, guide_name="tiny", command="pilotfish evaluate", prompts=names, names=names,
        judge=judge, rounds=1, batch_sizes=(1,), progress=lambda *what: told.append(what),
        **SMALL, **TOLD,
    )  # fmt: skip
    assert list(result.hosts) == ["base", "watercolour"]
    # The two hosts are the same denoiser here; only one has real pictures to compare with.
    base, other = result.hosts.values()
    assert base.guidance_error == other.guidance_error
    assert base.cfg.fd_judge > 0
    assert other.cfg.fd_judge != other.cfg.fd_judge
    assert Result.from_json(result.to_json()).to_json() == result.to_json()
    assert told[-1] == ("watercolour: pictures", 3, 3)
    assert result.run.samples == 3


def test_no_host(moved: Guide, judge: Judge) -> None:
    with pytest.raises(ValueError, match="no host"):
        evaluate({}, moved, guide_name="tiny", command="", judge=judge)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": 1}, "at least two samples"), ({"guidance_scale": 1.0}, "nothing to keep"),
     ({"prompts": ["dog"]}, "not among the names"),
     ({"inception_weights": "gone.pth"}, "no Inception weights in gone.pth"),
     ({"clip": "gone"}, "no CLIP in gone"), ({"pictures_folder": "gone"}, "metadata.jsonl")],
)  # fmt: skip
def test_bad_input_is_named_before_any_work(
    pipe: Any, guide: Guide, judge: Judge, names: list[str], real: Path,
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "pilotfish.evaluation.evaluation.pipeline_guidance_error", lambda *a, **k: 1 / 0
    )
    settings: dict[str, Any] = {
        "prompts": names, "names": names, "pictures_folder": real, "judge": judge, **SMALL, **TOLD
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        evaluate_host(pipe, guide, **{**settings, **change})


def test_a_sweep_at_w_is_the_cfg_of_an_evaluation(
    pipe: Any, guide: Guide, judge: Judge, names: list[str], real: Path,
    draw: Callable[..., torch.Tensor],
) -> None:  # fmt: skip
    same: dict[str, Any] = {
        "prompts": names, "names": names, "pictures_folder": real, "judge": judge, **SMALL
    }  # fmt: skip
    swept = sweep(pipe, guidance_scales=(1.0, 4.0), **same)
    found = evaluate_host(pipe, guide, **same, **TOLD)
    assert swept == {"1": found.none, "4": found.cfg}


class Stopped(Exception):
    pass


def test_goes_on_from_the_hosts_that_are_measured(
    hosts: dict[str, Host], moved: Guide, judge: Judge, names: list[str], tmp_path: Path
) -> None:
    file, told = tmp_path / "unfinished.json", []

    def run(guide: Guide, stop: str = "", file: Path | None = file) -> Result:
        def progress(what: str, done: int, total: int) -> None:
            told.append(what)
            if stop and what.startswith(stop):
                raise Stopped

        return evaluate(
            hosts, guide, guide_name="tiny", command="", prompts=names, names=names, judge=judge,
            rounds=1, batch_sizes=(1,), progress=progress, unfinished=file, **SMALL, **TOLD,
        )  # fmt: skip

    with pytest.raises(Stopped):
        run(moved, "watercolour: pictures")
    told.clear()
    resumed = run(moved)
    assert not any(what.startswith("base") for what in told)
    assert repr(resumed.hosts) == repr(run(moved, file=None).hosts)  # nan is not equal to itself
    told.clear()
    with torch.no_grad():
        next(moved.parameters()).mul_(1.5)
    assert repr(run(moved).hosts) != repr(resumed.hosts)
    assert any(what.startswith("base") for what in told), "another guide, yet nothing measured"
    file.write_text("{")
    told.clear()
    run(moved)
    assert any(what.startswith("base") for what in told), "an unreadable file, yet nothing measured"


def test_a_guide_in_half_precision_is_known_again_on_every_host(
    hosts: dict[str, Host], moved: Guide, judge: Judge, names: list[str], tmp_path: Path
) -> None:
    """A host turns the guide to its own precision; that makes no other guide of it."""
    told: list[str] = []
    for _ in range(2):
        told.clear()
        evaluate(
            hosts, deepcopy(moved).half(), guide_name="tiny", command="", prompts=names,
            names=names, judge=judge, rounds=1, batch_sizes=(1,), unfinished=tmp_path / "u.json",
            progress=lambda what, done, total: told.append(what), **SMALL, **TOLD,
        )  # fmt: skip
    assert not told
