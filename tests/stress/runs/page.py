"""``page``: the figures of ``docs/holding_up.md``, from ``results/holding_up.json``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.stress.runs.result import Figures, HoldingUp, Part

HELD = re.compile(r"(<!-- held -->\n).*?(<!-- /held -->)", re.DOTALL)


def _images(f: Figures) -> str:
    return (
        f"{f['images']:,.0f} pictures in batches of 8 and 1, after {f['warm_up']:.0f} to warm up: "
        f"the process, {f['resident_mib']:.0f} MiB, grew by {f['growth_mib']:.1f} MiB; "
        f"{f['tensors_left']:.0f} tensors left; the first picture drawn again, bit for bit"
    )


def _attach(f: Figures) -> str:
    left = ", ".join(f"{f[f'{n}_left']:.0f} {n}" for n in ("hooks", "classes", "tensors"))
    return (
        f"{f['attachments']:,.0f} times on and off: {left} left, {f['objects_left']:.0f} Python "
        f"objects more ({f['python_bytes_left']:.0f} bytes), {f['mib_left']:.1f} MiB more; every "
        "weight, and pictures guided and by CFG, bit for bit as before"
    )


def _kill(f: Figures) -> str:
    return (
        f"{f['kills']:.0f} kills in {f['steps']:.0f} steps ({f['kills_starting']:.0f} while "
        f"loading, {f['kills_training']:.0f} while training, {f['kills_writing']:.0f} aimed at the "
        f"writing of a checkpoint, of which {f['half_written']:.0f} left one half written): "
        f"{f['bytes_that_differ']:.0f} of {f['bytes_compared']:,.0f} bytes of the guide differ "
        "from the uninterrupted training's"
    )


def _app(f: Figures) -> str:
    return (
        f"{f['users']:.0f} users for {f['minutes']:.0f} minutes, {f['pictures']:,.0f} pictures: "
        f"{f['wrong']:.0f} wrong ones for their seed, {f['errors']:.0f} errors; "
        f"the server, {f['resident_mib']:.0f} MiB, grew by {f['growth_mib']:.1f} MiB after the "
        "first minute"
    )


def _fuzz(f: Figures) -> str:
    names = dict.fromkeys(key.rpartition(", ")[0] for key in f)
    counts = []
    for name in names:
        own = {k.rpartition(", ")[2]: n for k, n in f.items() if k.rpartition(", ")[0] == name}
        counts.append(f"{name}: " + ", ".join(f"{n:,.0f} {what}" for what, n in own.items()))
    return "; ".join(counts) + "; nothing else happened"


SENTENCES: dict[str, Callable[[Figures], str]] = {
    "images": _images, "attach": _attach, "kill": _kill, "app": _app, "fuzz": _fuzz,
}  # fmt: skip


def held(result: HoldingUp) -> str:
    """The table: part, figures, command."""
    parts = {name: result.parts[name] for name in SENTENCES if name in result.parts}
    rows = [
        f"| {name} | {SENTENCES[name](part.figures)} | `{part.command}` |"
        for name, part in parts.items()
    ]
    return "\n".join(["| | what was found | command |", "|---|---|---|", *rows, "", _where(parts)])


def _where(parts: dict[str, Part]) -> str:
    machines = dict.fromkeys(part.machine for part in parts.values())
    libraries = dict.fromkeys(
        ", ".join(f"{k} {v}" for k, v in part.versions.items()) for part in parts.values()
    )
    return (
        f"On {'; '.join(machines)}; {'; '.join(libraries)}. Everything is in "
        "`results/holding_up.json`."
    )


def write_page(page: Path, result: Path) -> None:
    """Put the figures between their two marks."""
    text = held(HoldingUp.load(result))
    page.write_text(HELD.sub(lambda m: m[1] + text + "\n" + m[2], page.read_text()))
