"""Commands in README and docs are commands: names and flags exist, values are in range."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from pilotfish import cli
from recipe.__main__ import Recipe

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`((?:pilotfish|python -m recipe) [^`\n]+)`(?!`)")
LAUNCHED = re.compile(r"^(?:accelerate launch|torchrun) .*-m pilotfish ")


class Parsed(Exception):
    """The arguments were parsed."""


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def commands(page: Path) -> Iterator[str]:
    """Every command line of a page, whole."""
    for block in blocks(page, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from INLINE.findall(BLOCK.sub("", page.read_text()))


def command_lines(program: str) -> list[Any]:
    """The arguments of all command lines of a program."""
    found = []
    for page in PAGES:
        for line in commands(page):
            plain = LAUNCHED.sub("pilotfish ", line)
            if plain.startswith(f"{program} "):
                words = shlex.split(plain, comments=True)[len(program.split()) :]
                words = [w for w in words if w != "..."]
                found.append(pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}"))
    return found


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands stop as soon as their arguments are parsed. The TOML files of the pages are there,
    each under the name in its first line."""
    for page in PAGES:
        for text in blocks(page, "toml"):
            (tmp_path / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    monkeypatch.chdir(tmp_path)
    parse = tyro.cli

    def stop(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)


@pytest.mark.parametrize("words", command_lines("pilotfish"))
def test_a_command_parses(words: list[str], parse_only: None) -> None:
    name, *flags = words
    assert name in cli.COMMANDS
    if name in ("distill", "distill-steps") and "--output" not in flags:
        flags += ["--output", "unused"]  # mentioned in a sentence
    with pytest.raises(Parsed):
        cli.command(name)(flags)


@pytest.mark.parametrize("words", command_lines("python -m recipe"))
def test_a_stage_of_the_recipe_exists(words: list[str]) -> None:
    assert tyro.cli(Recipe, args=words, use_underscores=True).stage == words[0]


@pytest.mark.parametrize("target", command_lines("make"))
def test_a_target_exists(target: list[str]) -> None:
    assert re.search(rf"^{target[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_command_is_documented() -> None:
    documented = {param.values[0][0] for param in command_lines("pilotfish")}
    assert documented == set(cli.COMMANDS)


def test_there_are_commands_on_the_pages() -> None:
    """A page whose blocks are no longer found would pass the rest."""
    for page in ("README", "serve", "publish", "compare", "scale", "method"):
        assert any(str(p.id).startswith(f"{page}.md: ") for p in command_lines("pilotfish")), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_to_headings(page: Path) -> None:
    for there, heading in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", page.read_text()):
        text = (page.parent / there if there else page).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert heading in slugs, (page.name, heading)


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_its_links_stay_on_the_site(page: Path) -> None:
    """`make docs` fails on a link to what is no page and no image of it."""
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in link:
            there = (page.parent / link).resolve()
            assert there.is_file(), (page.name, link)
            assert there.is_relative_to(ROOT / "docs"), (page.name, link)


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}\n" in menu for page in PAGES[1:])


def run_bundled(page: str) -> dict[str, Any]:
    """The names that the page's example on a bundled model leaves."""
    (block,) = (b for b in blocks(ROOT / "docs" / page, "python") if "bundled" in b)
    names: dict[str, Any] = {}
    exec(block, names)
    return names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_a_transformer_runs() -> None:
    assert run_bundled("transformers.md")["owl"].size == (64, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_example_of_a_service_runs() -> None:
    names = run_bundled("serve.md")
    assert len(names["owls"]) == 4
    assert names["owl"].size == names["crowned"].size == names["panda"].size == (64, 64)
    assert type(names["fluent"]).__mro__[1].__name__ != "Guided"
