"""Markdown tables of denoisers at full size: what a guide costs, and their memory."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import ShapeResult, ShapesResult, call_speedup
from benchmarks.memory import WEIGHTS, TrainingMemory
from benchmarks.shapes import SHAPES
from benchmarks.step import REFRESHED, STEPS

REFRESH = 3
"""Steps with both passes of a call."""
FORMS = {
    "tiny-cached": ", cached stream", "tiny-sampled": ", cached stream, sampled",
    "full": ", full guide",
}  # fmt: skip
"""Guides that are not the default, after the name of a denoiser."""
MODES = {"none": "no guidance", "cfg": "CFG", "tiny": "guided", "full": "full guide"}
APART = {"text encoders": "text encoders", "vae": "VAE, float32"}
"""Parts that need not be on the device with the denoiser."""


def shapes_markdown(found: ShapesResult, unets: bool) -> str:
    """A table of costs, those of memory, and one of the wall clock of those that were timed, with
    their commands.

    Args:
        unets: whether it has the UNets or the transformers.
    """
    names = [n for n in found.shapes if n in SHAPES and ("full" in SHAPES[n].guides) == unets]
    shapes = {name: found.shapes[name] for name in names}
    counted = {name: shape for name, shape in shapes.items() if shape.training}
    held = {name: shape for name, shape in shapes.items() if shape.largest_batch}
    commands = [shape.command for shape in shapes.values()]
    commands += [memory.command for shape in shapes.values() for memory in shape.training.values()]
    texts = [
        _costs(shapes),
        _memory(counted) if counted else "",
        _largest_batches(held) if held else "",
        f"Counted by {_joined(commands)}.",
    ]
    timed = {
        (name, key): shape
        for key, shape in found.shapes.items()
        if (name := key.partition(",")[0]) in names and shape.speedup
    }
    if timed:
        machines = " and ".join(dict.fromkeys(shape.machine for shape in timed.values()))
        by = _joined([shape.command for shape in timed.values()])
        texts += [_wall_clock(timed), f"Timed by {by} on {machines}."]
    return "\n\n".join(filter(None, texts)) + "\n"


def _costs(shapes: dict[str, ShapeResult]) -> str:
    head = (
        "denoiser", "parameters", "text tokens", "guide", "FLOPs, guided over plain",
        "CFG over guided, by FLOPs", f"with {REFRESH} refreshes in {STEPS} steps",
        "operators: added / plain pass",
    )  # fmt: skip
    rows = []
    for name, shape in shapes.items():
        for kind, guide in shape.guides.items():
            share, operators = shape.flops[kind] / shape.flops["none"], shape.operators.get(kind)
            rows.append((
                name + FORMS.get(kind, ""),
                f"{shape.parameters / 1e9:.2f} B", str(SHAPES[name].tokens),
                f"{guide.parameters / 1e6:.1f} M, {guide.share:.2%}", f"{share:.3f}",
                f"{2 / share:.2f}", f"{call_speedup(2 / share, REFRESH, STEPS):.2f}",
                f"{operators.added:,} / {operators.plain:,}" if operators else "",
            ))  # fmt: skip
    return markdown_table(head, rows)


def _wall_clock(timed: dict[tuple[str, str], ShapeResult]) -> str:
    head = (
        "wall clock of CFG over", "pixels", "no guidance", "guided",
        f"with {REFRESH} refreshes in {STEPS} steps",
    )  # fmt: skip
    rows = []
    for (name, key), shape in timed.items():
        side, speedup = shape.side or SHAPES[name].side, shape.speedup["1"]
        for kind in (kind for kind in shape.guides if kind in speedup):
            after = call_speedup(speedup.get(kind + REFRESHED, speedup[kind]), REFRESH, STEPS)
            rows.append((
                key.replace(name, name + FORMS.get(kind, ""), 1),
                f"{side:,} × {side:,}" if side else "video",
                *(f"{ratio:.2f}" for ratio in (speedup["none"], speedup[kind], after)),
            ))  # fmt: skip
    return markdown_table(head, rows)


def _joined(commands: Sequence[str]) -> str:
    return "; ".join(f"`{command}`" for command in dict.fromkeys(commands))


def _memory(shapes: dict[str, ShapeResult]) -> str:
    def row(title: str, values: Sequence[float]) -> tuple[str, ...]:
        return title, *(f"{value / 2**30:.1f}" for value in values)

    rows = []
    for guide, weights in (*(("tiny", weights) for weights in WEIGHTS), ("full", "")):
        key = ", ".join((guide, *[weights] * bool(weights)))
        found = [shape.training[key] for shape in shapes.values() if key in shape.training]
        if len(found) < len(shapes):
            continue
        stored = weights or found[0].dtype
        rows += [
            row(f"sampling, {MODES[mode]}, {stored}", [m.sampling[mode] for m in found])
            for mode in (("cfg", "tiny") if guide == "tiny" else (guide,))
        ]
        title = "training" + FORMS.get(guide, "")
        rows.append(row(f"{title}, {stored}", [_training(m) for m in found]))
    first = [shape.training["tiny"] for shape in shapes.values()]
    rows += [row(title, [m.parts[part] for m in first]) for part, title in APART.items()]
    return markdown_table(("GiB, batch 1", *shapes), rows)


def _largest_batches(shapes: dict[str, ShapeResult]) -> str:
    found = [shape.largest_batch for shape in shapes.values()]
    rows = [
        (f"{title}, {device}", *(f"{batches[device][mode]:,}" for batches in found))
        for device in found[0]
        for mode, title in MODES.items()
        if all(mode in batches.get(device, ()) for batches in found)
    ]
    return markdown_table(("largest batch", *shapes), rows)


def _training(memory: TrainingMemory) -> float:
    return memory.total - sum(memory.parts[part] for part in APART)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
