"""The names that the embedded model knows, and prompts that are no name."""

from __future__ import annotations

import random
from pathlib import Path

PATH = Path(__file__).with_name("vocabulary.txt")

# Words that recombine with the names; none of the pairs below is a caption.
COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "white")


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
    """``count`` prompts such as "red cat face" or "owl with crown" that are no caption."""
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
