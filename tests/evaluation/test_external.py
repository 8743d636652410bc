from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.evaluation.external import ClipScore, InceptionFID
from pilotfish.evaluation.features import Judge

REAL = torch.zeros(2, 3, 16, 16)


def test_clip_score_is_the_cosine_times_100(clip: Any, judge: Judge, tmp_path: Path) -> None:
    for part in clip:
        part.save_pretrained(tmp_path)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    score = ClipScore(tmp_path)
    score.update(images, ["cat", "a", "b"])
    cosine = (judge.images(images) * judge.texts(["cat", "a", "b"])).sum(1)
    assert score.compute() == pytest.approx(100 * max(0.0, float(cosine.mean())), abs=0.5)


def test_nothing_is_downloaded_and_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Inception weights in .*gone"):
        InceptionFID(tmp_path / "gone.pth", REAL)
    with pytest.raises(ValueError, match=r"no CLIP in .*gone"):
        ClipScore(tmp_path / "gone")
    with pytest.raises(ValueError, match="no CLIP could be read"):
        ClipScore(tmp_path)


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="holds no Inception weights"):
        InceptionFID(tmp_path / "trap.pth", REAL)
    assert not (tmp_path / "sprung").exists()
