"""What the README says is what the committed result says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pilotfish.evaluation.results import Result
from pilotfish.evaluation.tables import markdown_table
from recipe.pages import frontiers, readme_text

ROOT = Path(__file__).parent.parent
FRONTIER = ROOT / "results" / "frontier.json"


@pytest.mark.skipif(not FRONTIER.is_file(), reason="the frontier is not there")
def test_its_figures_are_the_committed_frontier() -> None:
    assert readme_text(*frontiers(FRONTIER)) in (ROOT / "README.md").read_text()


@pytest.mark.skipif(FRONTIER.is_file(), reason="the figures are those of the frontier")
def test_its_figures_are_the_committed_result() -> None:
    result, text = Result.load(ROOT / "results" / "guide.json"), (ROOT / "README.md").read_text()
    assert markdown_table(result).rstrip() in text
    assert result.run.command in text
    assert result.run.machine in text
    assert f"seed {result.run.seed}" in text


def test_its_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)
