"""What every test of the command line starts from: a base, its guide, prompts, and a user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pilotfish import cli
from pilotfish.guides import TinyGuide

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]
Say = Callable[..., tuple[int, str]]
SHORT = (
    "--train_batch_size", "4", "--max_train_steps", "4", "--pool", "8", "--replay_capacity", "8",
    "--checkpointing_steps", "2", "--validation_steps", "4", "--report_to", "none",
    "--lr_warmup_steps", "1",
)  # fmt: skip


@pytest.fixture
def base(make_pipe: Callable[[str], Any], tmp_path: Path) -> str:
    """A pipeline's folder."""
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "prompts.txt")


@pytest.fixture
def guide(make_pipe: Callable[[str], Any], randomise: Any, tmp_path: Path) -> str:
    """A guide's folder."""
    unet = make_pipe("epsilon").unet
    randomise(TinyGuide.for_denoiser(unet, "epsilon", rank=4)).save_pretrained(tmp_path / "guide")
    return str(tmp_path / "guide")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command; gives its exit code and what it said to its user as an error."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # the parser of flags
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run
