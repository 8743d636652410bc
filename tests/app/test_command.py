"""``pilotfish app``: what it says when it cannot start, and what it serves when it can."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from pilotfish import cli
from pilotfish.app import page as app
from tests.app.conftest import guide, pipeline


def test_without_gradio_it_says_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [m for m in sys.modules if m.startswith("pilotfish.app.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("pilotfish.app.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == 1
    assert "pip install 'pilotfish[app]'" in capsys.readouterr().err


def test_no_drawing_at_a_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["app", "--concurrency", "0"]) == 1
    assert "concurrency must be at least 1, not 0" in capsys.readouterr().err


def test_hosts_and_guides_of_ones_own_stand_beside_the_embedded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("pilotfish.cli.app.host", lambda name: pipeline(0))
    monkeypatch.setattr("pilotfish.cli.app.guide", lambda name: guide(4))
    monkeypatch.setattr(app, "build", lambda studio, **more: given.update(studio=studio, **more))
    monkeypatch.setattr(app, "serve", lambda page, *where: given.update(where=where))
    flags = ["--hosts", "mine", "--guides", "my", "--port", "8000", "--concurrency", "2"]
    assert cli.main(["app", *flags]) == 0
    assert given["studio"].hosts == [*bundled.MODELS, "mine"]
    assert list(given["studio"].guides) == [*bundled.guide_names(), "my"]
    assert given["where"] == ("127.0.0.1", 8000)
    assert given["concurrency"] == 2


def test_a_host_that_is_none_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    assert cli.main(["app", "--hosts", str(tmp_path)]) == 1
    assert f"no pipeline could be loaded from {tmp_path}" in capsys.readouterr().err
