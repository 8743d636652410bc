"""Public benchmarks by one command: on tiny stand-ins, resumed, repeated, and what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pilotfish.evaluation.images import draw
from pilotfish.evaluation.protocols import folders, scores
from pilotfish.evaluation.protocols.results import ComplianceResult, ProtocolResult
from tests.cli.conftest import Say

CAPTIONS = {
    "annotations": [
        {"image_id": 7, "id": 3, "caption": "a  dog\n"},
        {"image_id": 2, "id": 9, "caption": "never used"},
        {"image_id": 2, "id": 5, "caption": "a cat "},
        {"image_id": 4, "id": 6, "caption": "red cat"},
    ]
}
STEPS = 4


class MeanColours:
    """In Inception's place: the distance of mean colours."""

    def __init__(self, weights: Any, reference: Any, device: Any = "cpu") -> None:
        self.real: list[torch.Tensor] = []
        self.reset()

    def add_reference(self, batches: Any) -> None:
        self.real += [image.mean((1, 2)) for batch in batches for image in batch]

    def reset(self) -> None:
        self.own: list[torch.Tensor] = []

    def update(self, images: torch.Tensor, prompts: Sequence[str] = ()) -> None:
        self.own += [image.mean((1, 2)) for image in images]

    def compute(self) -> float:
        real, own = (torch.stack(x).mean(0) for x in (self.real, self.own))
        return float((real - own).square().sum())


@pytest.fixture
def flags(
    base: str, guide: str, clip: tuple[Any, Any], make_pipe: Callable[[str], Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:  # fmt: skip
    """The command for COCO with a base, a fine-tune, and everything that scores."""
    monkeypatch.setattr(scores, "InceptionFID", MeanColours)
    tuned = make_pipe("epsilon")
    with torch.no_grad():
        next(tuned.unet.parameters()).mul_(1.1)
    tuned.save_pretrained(tmp_path / "tuned")
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    (tmp_path / "inception.pth").write_bytes(b"weights")
    (tmp_path / "val").mkdir()
    for i, size in enumerate([(40, 30), (30, 40), (50, 50)]):
        Image.new("RGB", size, (60 * i, 20, 200)).save(tmp_path / "val" / f"{i}.jpg")
    return [
        "evaluate", "--protocol", "coco2017", "--models", base, str(tmp_path / "tuned"),
        "--guide", guide, "--prompts", str(tmp_path / "captions.json"),
        "--reference_images", str(tmp_path / "val"),
        "--inception_weights", str(tmp_path / "inception.pth"),
        "--clip", str(tmp_path / "clip"), "--pickscore", str(tmp_path / "clip"),
        "--refresh", "0", "1", "--num_inference_steps", str(STEPS), "--batch_size", "2",
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_protocol_from_prompts_to_its_table(flags: list[str], say: Say, tmp_path: Path) -> None:
    output = tmp_path / "out"
    code, error = say(*flags, "--output", str(output))
    assert code == 0, error
    found = ProtocolResult.load(output / "result.json")
    assert list(found.models) == ["base", "tuned"]
    assert found.run.guidance_scale == 7.5
    assert found.run.schedulers == dict.fromkeys(found.models, "DPMSolverMultistepScheduler")
    assert (found.run.samples, found.run.reference_images) == (3, 3)
    for rows in found.models.values():
        assert {name: row.passes for name, row in rows.items()} == {
            "none": STEPS, "cfg": 2 * STEPS, "guide-refresh-0": STEPS, "guide-refresh-1": STEPS + 1,
            "delta-reuse-1": STEPS + 1,
        }  # fmt: skip
        for row in rows.values():
            assert math.isfinite(row.fid)
            assert {name: math.isfinite(gain.mean) for name, gain in row.scores.items()} == {
                "clip_score": True, "pickscore": True,
            }  # fmt: skip
        assert len({row.scores["clip_score"].mean for row in rows.values()}) == len(rows)
    assert found.models["base"] != found.models["tuned"]
    images = output / "images" / "base" / "cfg"
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a cat", "red cat", "a dog"]
    assert all(Image.open(images / line["file_name"]).size == (16, 16) for line in lines)
    page = (output / "result.md").read_text()
    assert "## base" in page
    assert "| DICE (arXiv 2502.03726) | 20 | 28.54 | 80 % | 22.22 | arXiv 2502.03726 |" in page


def test_a_stopped_protocol_resumes_and_a_repeated_one_is_the_same(
    flags: list[str], base: str, say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ("--models", base, "--refresh", "1")
    drawn: list[int] = []

    def stop_at(limit: int) -> None:
        def draw_some(*args: Any, **kwargs: Any) -> Any:
            drawn.append(len(args[1]))
            if len(drawn) > limit:
                raise KeyboardInterrupt
            return draw(*args, **kwargs)

        drawn.clear()
        monkeypatch.setattr(folders, "draw", draw_some)

    def run(name: str, limit: int = 10**6) -> int:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        stop_at(limit)
        return say(*flags, *one, "--output", "out")[0]

    assert run("whole") == 0
    assert drawn == [2, 1] * 4, "four methods, three images in batches of two"
    whole = contents(tmp_path / "whole")
    assert run("stopped", limit=5) == 130
    assert not (tmp_path / "stopped" / "out" / "result.json").exists()
    assert run("stopped") == 0
    assert len(drawn) == 3
    assert contents(tmp_path / "stopped") == whole

    lost = tmp_path / "whole" / "out" / "images" / "base" / "cfg" / "00002.png"
    lost.unlink()
    (lost.parents[3] / "scores.json").unlink()
    assert run("whole") == 0
    assert drawn == [1], "only its batch"
    assert contents(tmp_path / "whole") == whole
    monkeypatch.setattr(scores.Cosines, "measure", pytest.fail)
    assert run("whole") == 0
    assert (drawn, contents(tmp_path / "whole")) == ([], whole)


def test_images_of_other_settings_are_not_mixed(flags: list[str], say: Say, tmp_path: Path) -> None:
    small = [*flags, "--metrics", "clip_score", "--output", str(tmp_path / "out")]
    code, error = say(*small)
    assert code == 0, error
    before = contents(tmp_path / "out")
    code, error = say(*small, "--guidance_scale", "5")
    assert code == 1
    assert "holds images of another guidance_scale: 7.5, not 5; delete the folder" in error
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("from_file", [False, True])
def test_compliance_with_negative_prompts(
    from_file: bool, flags: list[str], guide: str, say: Say, tmp_path: Path
) -> None:
    given = ["--samples", "4"]
    if from_file:
        (tmp_path / "pairs.tsv").write_text(
            "prompt\tnegative_prompt\na cat\tdog\nred cat\ta\n", encoding="utf-8"
        )
        given = ["--prompts", str(tmp_path / "pairs.tsv"), "--samples", "4"]
    code, error = say(
        "evaluate", "--protocol", "negative-prompts", *flags[3:5], "--guide", f"mine={guide}",
        "--clip", str(tmp_path / "clip"), *given, "--refresh", "1", "--num_inference_steps",
        str(STEPS), "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, error
    found = ComplianceResult.load(tmp_path / "out" / "result.json")
    rows = found.models["base"]
    assert {name: row.passes for name, row in rows.items()} == {
        "cfg": 2 * STEPS, "mine-refresh-1": STEPS + 1, "delta-reuse-1": STEPS + 1,
    }  # fmt: skip
    for row in rows.values():
        assert row.suppression == pytest.approx(row.without - row.with_negative)
        assert row.without != row.with_negative
    assert found.run.prompts.startswith("2 texts" if from_file else "16 texts")
    assert "of CFG's suppression" in (tmp_path / "out" / "result.md").read_text()


def test_all_that_is_missing_is_said_at_once(say: Say, flags: list[str], tmp_path: Path) -> None:
    code, error = say("evaluate", "--protocol", "coco2017")
    assert code == 1
    for flag in ("models", "guide", "prompts", "reference_images", "inception_weights", "clip",
                 "pickscore"):  # fmt: skip
        assert f"\n  --{flag}: " in error
    assert "captions_val2017.json" in error
    code, error = say(*flags, "--clip", "no/clip", "--pickscore", str(tmp_path), "--metrics",
                      "clip_score", "--guide", "owner/guide")  # fmt: skip
    assert code == 1
    assert "--clip no/clip: there is nothing; folder of a CLIP" in error
    assert "--guide owner/guide: there is none here" in error
    assert "--pickscore" not in error
    code, error = say("evaluate", "--protocol=negative-prompts")
    assert code == 1
    assert "--prompts" not in error


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (("--guidance_scale", "1"), "CFG gains nothing at w = 1"),
        (("--samples", "1"), "at least two samples"),
        (("--refresh", "4"), "--refresh 4: at least 0 and fewer than 4 steps"),
        (("--delta_reuse", "0"), "--delta_reuse 0: at least 1"),
        (("--guide", "a=tiny", "a=tiny"), "two guides have one name"),
        (("--protocol", "negative-prompts"), "has the metric clip_score alone"),
    ],
)
def test_settings_that_measure_nothing(
    changed: tuple[str, ...], sentence: str, flags: list[str], say: Say, tmp_path: Path
) -> None:
    metrics = ("--metrics", "clip_score", "pickscore")
    code, error = say(*flags, *metrics, *changed, "--output", str(tmp_path / "out"))
    assert code == 1
    assert sentence in error
    assert not (tmp_path / "out").exists()
