"""What the README says is what the committed result says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pilotfish.evaluation.results import Result
from pilotfish.evaluation.tables import markdown_table
from recipe.pages import readme_text as measured

ROOT = Path(__file__).parent.parent


@pytest.fixture
def result() -> Result:
    return Result.load(ROOT / "results" / "guide.json")


def test_its_figures_are_the_committed_result(result: Result) -> None:
    text = (ROOT / "README.md").read_text()
    assert measured(result) in text
    assert markdown_table(result).rstrip() in text


def test_it_names_command_machine_and_seed(result: Result) -> None:
    text = (ROOT / "README.md").read_text()
    assert result.run.command in text
    assert result.run.machine in text
    assert f"seed {result.run.seed}" in text


def test_its_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)
