"""The page of the docs is what is tested, and everything on it is."""

from __future__ import annotations

import re
from pathlib import Path

from tests.pipelines import matrix

HERE = Path(__file__).parent


def test_every_feature_has_a_test() -> None:
    text = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    named = re.findall(r'parametrize\("name", covered\("(.+?)"\)\)', text)
    schedulers = [name for name in matrix.FEATURES if name.endswith("Scheduler")]
    assert {*named, *schedulers} == set(matrix.FEATURES)


def test_the_page_in_the_docs_is_generated_from_the_matrix() -> None:
    assert (HERE.parents[1] / "docs" / "compatibility.md").read_text() == matrix.page()
