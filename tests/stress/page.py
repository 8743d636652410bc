"""The figures of ``docs/stress.md``, from ``results/stress.json``.

``python -m tests.stress.page`` writes them between the two marks of the page.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

LONG = os.environ.get("STRESS") == "1"
"""Whether the stress tests run at length."""
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "stress.json"
PAGE = ROOT / "docs" / "stress.md"
MARKED = re.compile(r"(<!-- held -->\n).*?(<!-- /held -->)", re.DOTALL)


def table(found: dict[str, Any]) -> str:
    """A row for each test, and where they ran."""
    lines = ["| | figures | command |", "|---|---|---|"]
    for name, part in found.items():
        figures = "; ".join(f"{what}: {_number(n)}" for what, n in part["figures"].items())
        lines.append(f"| {name} | {figures} | `{part['command']}` |")
    places = dict.fromkeys(
        f"{part['machine']}; {', '.join(f'{k} {v}' for k, v in part['versions'].items())}"
        for part in found.values()
    )
    return "\n".join([*lines, "", f"Measured on {'; '.join(places)}."])


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def written(page: str, results: Path = RESULTS) -> str:
    """The text of the page with the figures of the results."""
    text = table(json.loads(results.read_text()))
    return MARKED.sub(lambda m: f"{m[1]}{text}\n{m[2]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
