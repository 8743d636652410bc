"""The long trials, short; and the page that tells of the long ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig
from tests.stress.runs.attachments import many_attachments
from tests.stress.runs.images import many_images
from tests.stress.runs.kills import many_kills
from tests.stress.runs.page import SENTENCES, held, write_page
from tests.stress.runs.result import EnduranceError, HoldingUp

ROOT = Path(__file__).parent.parent.parent


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_pictures_leave_nothing_behind(trained: Guide, pipe: Any) -> None:
    figures = many_images(
        pipe, trained, ["cat", "a dog"], images=30, warm_up=30, seed=0, progress=quiet
    )
    assert figures["images"] == 30
    assert figures["tensors_left"] == 0


def test_a_leak_of_one_tensor_a_picture_is_noticed(fresh: Guide, pipe: Any) -> None:
    kept: list[torch.Tensor] = []
    fresh.register_forward_pre_hook(lambda _, args: kept.append(args[0].latents))
    with pytest.raises(EnduranceError, match="tensors were left"):
        many_images(pipe, fresh, ["cat"], images=9, warm_up=9, seed=0, progress=quiet)


def test_attachments_leave_nothing_behind(
    trained: Guide, pipe: Any, draw: Callable[..., torch.Tensor]
) -> None:
    figures = many_attachments(pipe, trained, draw, attachments=50, progress=quiet)
    assert figures["attachments"] == 50
    assert figures["hooks_left"] == figures["classes_left"] == figures["weights_changed"] == 0


def test_a_hook_that_stays_is_noticed(
    trained: Guide, pipe: Any, draw: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = type(trained).attach

    def attach(self: Any, pipe: Any) -> None:
        plain(self, pipe)
        pipe.vae.register_forward_hook(lambda *_: None)

    monkeypatch.setattr(type(trained), "attach", attach)
    with pytest.raises(EnduranceError, match="10 hooks were left"):
        many_attachments(pipe, trained, draw, attachments=10, progress=quiet)


@pytest.mark.slow
def test_three_kills_change_nothing(make_pipe: Callable[[str], Any], tmp_path: Path) -> None:
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a cat\ncat\ndog\nred cat")
    config = DistillConfig(
        output=str(tmp_path / "runs"), pretrained_model_name_or_path=str(tmp_path / "base"),
        prompts=str(tmp_path / "prompts.txt"), train_batch_size=4, max_train_steps=400, pool=8,
        replay_capacity=8, trajectory_steps_min=2, trajectory_steps_max=4, checkpointing_steps=5,
        validation_steps=400, lr_warmup_steps=1, report_to="none",
    )  # fmt: skip
    figures = many_kills(config, kills=3, seed=0, progress=quiet)
    assert figures["kills"] == 3
    assert figures["bytes_that_differ"] == 0
    assert 0 < figures["step_at_last_kill"] < 400


def test_the_page_says_what_the_committed_figures_say(tmp_path: Path) -> None:
    result = ROOT / "results" / "holding_up.json"
    page = ROOT / "docs" / "holding_up.md"
    assert set(HoldingUp.load(result).parts) == set(SENTENCES)
    assert held(HoldingUp.load(result)) in page.read_text()
    copy = tmp_path / "page.md"
    copy.write_text(re.sub(r"\| \w+ \|.*\n", "", page.read_text()))
    assert copy.read_text() != page.read_text()
    write_page(copy, result)
    assert copy.read_text() == page.read_text()


def test_a_part_of_another_command_is_not_taken_for_done() -> None:
    result = HoldingUp().with_part("images", {"images": 3.0}, "images --images 3", 0)
    assert result.has("images", "images --images 3")
    assert not result.has("images", "images --images 4")
    assert not result.has("kill", "images --images 3")
