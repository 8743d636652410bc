from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.plots import step_curves
from pilotfish.evaluation.steps import StepsResult, Way, score_steps
from pilotfish.evaluation.sweep import sweep
from pilotfish.evaluation.table import step_rows, steps_markdown
from pilotfish.guides import Guide
from pilotfish.pipelines.loading import take_ddim_steps


def few(guide: Guide, steps: int) -> Guide:
    """As if it had been distilled to so many steps."""
    other = deepcopy(guide)
    other.register_to_config(timesteps=[900 // steps * (k + 1) for k in range(steps)][::-1])
    return other


def measure(hosts: dict[str, Host], judge: Judge, names: list[str], **more: Any) -> StepsResult:
    settings: dict[str, Any] = {"steps": (2, 1), "samples": 3, "batch_size": 2, "rounds": 1}
    return score_steps(
        hosts, more.pop("methods", {}), names=names, command="pilotfish steps", judge=judge,
        **settings | more,
    )  # fmt: skip


def test_every_way_is_measured_at_the_steps_that_it_can_take(
    hosts: dict[str, Host], judge: Judge, names: list[str], moved: Guide, tmp_path: Path
) -> None:
    found = measure(hosts, judge, names, methods={"any": [moved], "few": [few(moved, 2)]})
    for ways in found.hosts.values():
        assert {way: list(cells) for way, cells in ways.items()} == {
            "none": ["1", "2"], "cfg": ["1", "2"], "any": ["1", "2"], "few": ["2"],
        }  # fmt: skip
        assert ways["few"]["2"].scores.cosine == pytest.approx(ways["any"]["2"].scores.cosine)
        assert [c.passes for c in ways["cfg"].values()] == [2, 4]
        assert [c.passes for c in ways["any"].values()] == [1, 2]
    assert found.wall_clock["cfg"]["2"] == 1
    assert set(found.guides) == {"any", "few-2"}
    found.save(tmp_path / "steps.json")
    assert StepsResult.load(tmp_path / "steps.json").to_json() == found.to_json()
    rows = step_rows(found, "base")
    assert len(rows) == 7
    assert steps_markdown(found, "base").count("\n") == 9
    assert len(step_curves(found, "base").axes) == 2


def test_cfg_is_that_of_a_sweep(hosts: dict[str, Host], judge: Judge, names: list[str]) -> None:
    found = measure(hosts, judge, names, steps=(2,))
    host = hosts["base"]
    swept = sweep(
        host.load(), prompts=names, names=names, pictures_folder=host.pictures,
        samples=3, num_inference_steps=2, batch_size=2, guidance_scales=(1.0, 4.0), judge=judge,
    )  # fmt: skip
    assert found.hosts["base"]["none"]["2"].scores == swept["1"]
    assert found.hosts["base"]["cfg"]["2"].scores == swept["4"]


def test_hosts_with_another_scheduler_take_ddim_steps(
    hosts: dict[str, Host], judge: Judge, names: list[str]
) -> None:
    """SD 1.5 comes with PNDM, at whose timesteps no guide for few steps was ever trained."""
    with_ddim = measure(hosts, judge, names)

    def other(host: Host) -> Host:
        pipe = host.load()
        pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
        return Host(lambda: pipe, host.pictures)

    found = measure({name: other(host) for name, host in hosts.items()}, judge, names)
    assert found.hosts == with_ddim.hosts


def test_a_solver_that_knows_of_no_clipping_brings_none(pipe: Any) -> None:
    """DDIM clips clean latents to [-1, 1] if nobody tells it not to, and theirs are wider."""
    pipe.scheduler = EulerDiscreteScheduler()
    take_ddim_steps(pipe)
    assert not pipe.scheduler.config.clip_sample
    pipe.scheduler = DDIMScheduler(clip_sample=True)  # asked for, it stays
    take_ddim_steps(pipe)
    assert pipe.scheduler.config.clip_sample


def test_two_guides_for_the_same_steps_are_refused(moved: Guide) -> None:
    with pytest.raises(ValueError, match="two guides of one way for 2 steps"):
        Way.of(4.0, [few(moved, 2), few(moved, 2)])
    with pytest.raises(ValueError, match="any number of steps"):
        Way.of(4.0, [moved, moved])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hosts": {}}, "at least one host"), ({"steps": ()}, "one number of steps"),
        ({"steps": (0,)}, "one number of steps"), ({"guidance_scale": 1.0}, "w = 1"),
        ({"samples": 1}, "at least two samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_named(
    hosts: dict[str, Host], judge: Judge, names: list[str], wrong: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        measure(wrong.pop("hosts", hosts), judge, names, **wrong)


def test_goes_on_where_it_was_stopped(
    hosts: dict[str, Host], judge: Judge, names: list[str], moved: Guide, tmp_path: Path
) -> None:
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append(what)
        if len(told) == 7:
            raise KeyboardInterrupt

    given: dict[str, Any] = {"methods": {"tiny": [moved]}, "unfinished": tmp_path / "u.json"}
    with pytest.raises(KeyboardInterrupt):
        measure(hosts, judge, names, progress=progress, **given)
    before = set(told[:6])
    resumed = measure(hosts, judge, names, progress=progress, **given)
    assert not before & set(told[7:]), "what was finished was drawn again"
    assert resumed.hosts.keys() == hosts.keys()
    whole = measure(hosts, judge, names, methods={"tiny": [moved]})
    assert repr(resumed.hosts) == repr(whole.hosts)
