"""Stage 0, ``prompts``: captions, training prompts for guides, and held-out prompts."""

from __future__ import annotations

from pathlib import Path

from recipe.vocabulary import captions, recombinations

# few of them, and a guide learns by heart what CFG does to each
TRAINING = 12000
HELD_OUT = 128


def make_prompts(target: Path) -> None:
    """Three text files; no held-out prompt is a caption or a training prompt."""
    target.mkdir(parents=True, exist_ok=True)
    held_out = recombinations(HELD_OUT, seed=1)
    training = [p for p in recombinations(TRAINING, seed=2) if p not in set(held_out)]
    for name, lines in (
        ("captions", captions()),
        ("training", captions() + training),
        ("held_out", held_out),
    ):
        (target / f"{name}.txt").write_text("\n".join(lines) + "\n")
