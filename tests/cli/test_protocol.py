"""Public benchmarks by one command: on tiny stand-ins, resumed, repeated, and what is missing."""

from __future__ import annotations

import json
import math
import shutil
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


def test_a_protocol_from_prompts_to_its_table(
    flags: list[str], say: Say, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, error = say(*flags, "--output", str(output))
    assert code == 0, error
    found = ProtocolResult.load(output / "result.json")
    assert list(found.models) == ["base", "tuned"]
    assert found.run.guidance_scale == 7.5
    assert found.run.schedulers == dict.fromkeys(found.models, "DPMSolverMultistepScheduler")
    assert (found.run.samples, found.run.reference_images) == (3, 3)
    for rows in found.models.values():
        passes = {name: row.passes for name, row in rows.items()}
        assert passes == {
            "none": STEPS, "cfg": 2 * STEPS, "guide-refresh-0": STEPS, "guide-refresh-1": STEPS + 1,
            "delta-reuse-1": STEPS + 1,
        }  # fmt: skip
        for name, row in rows.items():
            assert math.isfinite(row.fid)
            for gain in row.scores.values():
                assert math.isnan(gain.kept) == (name in ("none", "cfg"))
                assert gain.interval.low <= gain.interval.high or math.isnan(gain.kept)
    assert found.models["base"] != found.models["tuned"]
    images = output / "images" / "base" / "cfg"
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a cat", "red cat", "a dog"]
    assert all(Image.open(images / line["file_name"]).size == (16, 16) for line in lines)
    page = (output / "result.md").read_text()
    assert "## base" in page
    assert "| DICE (arXiv 2502.03726) | 20 | 28.54 | 80 % | 22.22 | arXiv 2502.03726 |" in page
