"""Stage ``prompts``: the names that the base knows, and prompts that recombine them."""

from __future__ import annotations

import random
from pathlib import Path

PATH = Path(__file__).with_name("vocabulary.txt")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "white")
TRAINING, HELD_OUT = 12000, 128
"""Number of recombinations. With few of them a guide memorises what CFG does to each."""


def categories() -> dict[str, list[str]]:
    """Icon names by category, in file order."""
    lines = [line for line in PATH.read_text().splitlines() if line and not line.startswith("#")]
    return {key: names.split() for key, names in (line.split(": ") for line in lines)}


def caption(name: str) -> str:
    """The text of an icon name: ``cat-face`` -> ``cat face``."""
    return name.replace("-", " ")


def captions() -> list[str]:
    """Every caption, in file order."""
    return [caption(name) for names in categories().values() for name in names]


def recombinations(count: int, seed: int) -> list[str]:
    """``count`` prompts such as "red cat face" or "owl with crown", none of them a caption."""
    known = set(captions())
    rng = random.Random(seed)
    by = {key: [caption(n) for n in names] for key, names in categories().items()}
    things = [c for c in captions() if not set(c.split()) & set(COLOURS)]
    short = [c for c in by["objects"] + by["food"] if len(c.split()) == 1]
    found: dict[str, None] = {}
    while len(found) < count:
        thing = rng.choice(things)
        prompt = (
            f"{rng.choice(COLOURS)} {thing}"
            if rng.random() < 0.5
            else f"{rng.choice(by['animals'])} with {rng.choice(short)}"
        )
        if prompt not in known:
            found[prompt] = None
    return list(found)


def write_prompts(target: Path) -> None:
    """``captions.txt``, ``training.txt`` and ``held_out.txt``; no held-out prompt is in another."""
    target.mkdir(parents=True, exist_ok=True)
    held_out = recombinations(HELD_OUT, seed=1)
    training = [p for p in recombinations(TRAINING, seed=2) if p not in set(held_out)]
    for name, lines in (
        ("captions", captions()),
        ("training", captions() + training),
        ("held_out", held_out),
    ):
        (target / f"{name}.txt").write_text("\n".join(lines) + "\n")
