"""Stage ``pages``: tables and plots of README and documents, from ``results/``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from baselines.comparison.report import BUDGETS, comparison_markdown, pareto
from baselines.comparison.results import ComparisonResult
from baselines.frontier.report import (
    frontier_markdown,
    frontier_plot,
    groups,
    summary,
    summary_markdown,
)
from baselines.frontier.results import FrontierResult
from baselines.guidances import GuidancesResult
from baselines.guidances import table as guidances_markdown
from benchmarks.measure import ShapesResult
from benchmarks.presets import PresetsResult, presets_markdown
from benchmarks.report import shapes_markdown
from pilotfish import bundled
from pilotfish.evaluation.grids import draw_models, sheet
from pilotfish.evaluation.images import bundled_models
from pilotfish.evaluation.plots import curve, save
from pilotfish.evaluation.results import CurveResult, NegativeResult, Run
from pilotfish.evaluation.tables import curve_markdown, markdown, percent, with_interval
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.sampling import Attachable
from recipe.quantization import QuantizationResult, quantization_text
from recipe.transformer import TransformerResult

TARGETS = {"8": {"base": (0.95, 1.05), "": (0.90, 1.15)}, "16": {"base": (1.0, 1.0)}}
"""Of guides for few steps, by number of steps and by model, "" for a fine-tune: the least top-1
and the largest fd_clip, relative to CFG with the most steps."""
REFRESH = 3
"""Steps with both passes in the README."""


def write_measured(page: Path, name: str, text: str) -> None:
    """Put a text between the two marks of a result in a page, ``<!-- measured: NAME -->`` and
    ``<!-- /measured -->``.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end, before = f"<!-- measured: {name} -->\n", "<!-- /measured -->", page.read_text()
    marks = re.compile(f"({begin}).*?({end})", re.DOTALL)
    if not marks.search(before):
        raise ValueError(f"{page} has no {begin.rstrip()} and {end}")
    page.write_text(marks.sub(lambda m: m[1] + text.rstrip() + "\n" + m[2], before))


def write_pages(root: Path) -> None:
    """Write the README and those documents of the repository whose results are there."""
    results, docs = root / "results", root / "docs"
    pages: dict[tuple[str, str], Callable[[Path], str]] = {
        ("README.md", "frontier"): lambda p: readme_text(*frontiers(p)),
        ("refresh.md", "frontier"): lambda p: refresh_page(FrontierResult.load(p), docs),
        ("steps.md", "frontier"): lambda p: few_steps_text(FrontierResult.load(p)),
        ("steps.md", "steps"): lambda p: steps_page(CurveResult.load(p), docs),
        ("compare.md", "compare"): lambda p: compare_page(ComparisonResult.load(p), docs),
        ("method.md", "negative"): lambda p: negatives_text(NegativeResult.load(p)),
        ("guidance.md", "guidances"): lambda p: guidances_text(GuidancesResult.load(p)),
        ("train.md", "presets"): lambda p: presets_markdown(PresetsResult.load(p)),
        ("train.md", "quantization"): lambda p: quantization_text(QuantizationResult.load(p)),
        ("scale.md", "shapes"): lambda p: shapes_markdown(ShapesResult.load(p), unets=True),
        ("transformers.md", "shapes"): lambda p: shapes_markdown(ShapesResult.load(p), unets=False),
        ("transformers.md", "transformer"): lambda p: transformer_text(TransformerResult.load(p)),
    }
    for (page, name), text in pages.items():
        if (file := results / f"{name}.json").is_file():
            write_measured((root if page == "README.md" else docs) / page, name, text(file))


def frontiers(file: Path) -> list[FrontierResult]:
    """That of the UNet, and that of the Stable Diffusion 3 where it is there."""
    files = (file, file.parent / "sd3" / file.name)
    return [FrontierResult.load(file) for file in files if file.is_file()]


def readme_text(found: FrontierResult, *others: FrontierResult) -> str:
    """The README's table of one or both bases, and its legend."""
    run, best = found.run, f"guided, refresh={REFRESH}"
    columns = {
        "no guidance": ("none", 0), "guided": ("guide", 0), best: ("guide", REFRESH),
        "CFG": ("cfg", run.num_inference_steps),
    }  # fmt: skip
    every = (found, *others)
    together = replace(found, models={k: v for one in every for k, v in one.models.items()})
    models = [name for name in bundled.STYLES if name in together.models]
    shown = summary(together, columns, models)
    also = " and [results/sd3/frontier.json](results/sd3/frontier.json)" if others else ""
    guides = [one.run.guides[bundled.guide_of(next(iter(one.models)))] for one in every]
    sizes = " and ".join(f"{g.parameters:,} parameters, {g.share:.2%}" for g in guides)
    sizes = f"The guides have {sizes}" if others else f"The guide has {sizes}"
    return (
        f"{summary_markdown(together, columns, models, best).rstrip()}\n\n"
        "*Top-1*: the share of images whose prompt a small CLIP ranks first among all names; it "
        "takes no part in training. After it the share of CFG's gain over no guidance that is "
        f"kept, with its 95 % interval. *Guided*: the guide, one pass in each step. "
        f"*refresh={REFRESH}*: both passes in {REFRESH} of the {run.num_inference_steps} steps, "
        f"the guide in the others. *w*: the guidance scale.\n\n"
        f"Measured by {' and '.join(f'`{command}`' for command in shown.commands)} on "
        f"{' and '.join(shown.machines)}, seed {run.seed}, {run.samples:,} images for each model "
        f"and column, {run.dtype}; the whole result is in "
        f"[results/frontier.json](results/frontier.json){also}. {sizes} of the denoiser's, "
        f"and {'were' if others else 'was'} trained on none of these fine-tunes."
    )


def draw_grid(file: Path, base: str) -> None:
    """Images of a bundled base and its fine-tunes: no guidance, guided without and with refreshes,
    CFG. That of ``base`` is the README's picture."""
    guide = bundled.load_guide(bundled.guide_of(base))
    columns: dict[str, tuple[float, Attachable | None]] = {
        "no guidance": (1.0, None), "guided": (4.0, Refreshed(guide, 0)),
        f"refresh={REFRESH}": (4.0, Refreshed(guide, REFRESH)), "CFG": (4.0, None),
    }  # fmt: skip
    prompts = bundled.GRID_PROMPTS
    sheet(prompts, draw_models(bundled_models(base), columns, prompts)).save(file)


def refresh_page(found: FrontierResult, docs: Path) -> str:
    """The plot of the frontier and its table."""
    run = found.run
    columns = groups(found, "base", bundled.test_finetune_names())
    timed = any(entry.has_cost for entries in found.models.values() for entry in entries)
    cost = f"by `{run.cost_command}` on {run.cost_machine}"
    relative = f"; FLOPs and speed are relative to CFG, timed {cost}" if timed else ""
    save(frontier_plot(found, columns, list(run.guides)), docs / "images" / "frontier.png")
    return (
        f"![CFG gain kept, and distance to CFG, by passes](images/frontier.png)\n\n"
        f"Measured on {' and '.join(found.machines)}, seed {run.seed}, w = "
        f"{run.guidance_scale:g}, {run.dtype}, {run.samples:,} images for each point of our guides "
        f"in their default places and of delta reuse, {run.baseline_samples:,} of the others; "
        "the whole result is in `results/frontier.json`. *Kept* is the share of CFG's gain in "
        "top-1 over no guidance, *latent MSE* that of the final latents to CFG's, relative to no "
        f"guidance{relative}. The commands:\n\n{_bash(found.commands)}\n\n"
        f"{frontier_markdown(found, columns).rstrip()}"
    )


def few_steps_text(found: FrontierResult) -> str:
    """Top-1 of the guides for few steps relative to CFG with the reference steps, on the base and
    its fine-tunes."""
    run, most = found.run, found.run.reference_steps
    models = [name for name in bundled.BASES["base"] if name in found.models]
    cfg = found.only({name: [("cfg", str(most), "", most)] for name in models})
    guides = [name for name in run.guides if name != bundled.guide_of("base")]
    every = [entry for entry in found.models[models[0]] if entry.method in guides]
    shown = found.only({name: [entry.key for entry in every] for name in models})
    rows = [
        (
            entry.method, f"{entry.refresh:g}", f"{entry.passes:g}",
            *(percent(shown.models[m][i].top1 / cfg.models[m][0].top1) for m in models),
            f"{entry.latent_mse_ratio:.3f}",
        )
        for i, entry in enumerate(every)
    ]  # fmt: skip
    rows.sort(key=lambda row: (guides.index(row[0]), row[1]))
    head = ["guide", "second passes", "passes", *models, f"latent MSE, {models[0]}"]
    return (
        f"{markdown(head, rows).rstrip()}\n\n"
        f"Top-1 relative to that of CFG with {most} steps, {2 * most} passes; the latent MSE is "
        "that to its latents, relative to no guidance. Measured in "
        f"{run.dtype} on {' and '.join(shown.machines)}, seed {run.seed}, {run.samples:,} images "
        f"for each point; the whole result is in `results/frontier.json`. The commands:\n\n"
        f"{_bash(shown.commands)}"
    )


def negatives_text(found: NegativeResult) -> str:
    """The guidance error with negative prompts on each model, in a sentence."""
    models = ", ".join(
        f"{model.conditioned.mean:.3f} on {name} ({model.ratio:.2f} times that with the null "
        f"prompt; {model.ratio_ignoring:.2f} where the guide ignores it)"
        for name, model in found.models.items()
    )
    scales = ", ".join(next(iter(found.models.values())).conditioned.by_w)
    return (
        f"Measured by `{found.run.command}` on {found.run.machine}, seed {found.run.seed}, "
        f"{found.run.samples} held-out pairs, w = {scales}, {found.run.refreshes}; the whole "
        "result is in `results/negative.json`. With negative prompts the guidance error is "
        f"{models}."
    )


def guidances_text(found: GuidancesResult) -> str:
    """The table of guidances and of the guides that were taught them."""
    run = found.run
    return (
        f"{guidances_markdown(found).rstrip()}\n\n"
        f"Measured by `{run.command}` on {run.machine}, seed {run.seed}, {run.samples:,} images "
        f"for each row, {run.dtype}; the whole result is in `results/guidances.json`. *Kept* is "
        "the share of the gain of the guide's own guidance over no guidance, in one pass a step "
        "or with refreshes. The best of each guidance is in bold: the lowest fd_clip with at "
        "least the top-5 of CFG at its own lowest."
    )


def transformer_text(found: TransformerResult) -> str:
    """What the guide of the Stable Diffusion 3 keeps of CFG: a column for each model."""
    models = list(found.models.values())
    first = models[0]
    batches = " and ".join(next(iter(found.cost.values())))
    speeds = [
        f"{' and '.join(f'{ratio:.2f}' for ratio in by_batch.values())} in {passes} passes"
        for passes, by_batch in found.cost.items()
    ]
    kept = "kept, {} passes", lambda m, n: with_interval(m.gain_kept[n], *astuple(m.interval[n]))
    near = "latent MSE, {} passes", lambda m, n: f"{m.latent_mse_ratio[n]:.3f}"
    few = "top-1, {} passes", lambda m, n: percent(m.few_steps[n])
    negative = "negative ratio, {} passes", lambda m, n: f"{m.negative_ratio[n]:.2f}"
    rows = [
        (title.format(n), *(cell(model, n) for model in models))
        for (title, cell), passes in (
            (kept, first.gain_kept), (near, first.gain_kept), (negative, first.negative_ratio),
            (few, first.few_steps),
        )
        for n in passes
    ]  # fmt: skip
    rows.append(("guidance error", *(f"{m.guidance_error.mean:.3f}" for m in models)))
    rows.append(("cosine", *(f"{m.cosine:.3f}" for m in models)))
    run = found.run
    return (
        f"{markdown(['', *found.models], rows).rstrip()}\n\n"
        "*Kept* is the share of CFG's gain in top-1 over no guidance, with its 95 % interval; "
        "*latent MSE* that of the final latents to CFG's, relative to no guidance; *negative "
        "ratio* the guidance error where every prompt has another name as its negative prompt, "
        "over that with the null prompt; *top-1* that of the guides for few steps, relative to CFG "
        f"in {run.reference_steps} steps. Guidance error and cosine are of one pass in every step. "
        f"Wall clock on the base, CFG over the guide at batch {batches}: {', '.join(speeds)}. "
        f"Measured in {run.dtype} on {' and '.join(run.machines)}, seed {run.seed}; the whole "
        f"result is in `results/transformer.json`. The commands:\n\n{_bash(run.commands)}"
    )


def steps_page(found: CurveResult, docs: Path) -> str:
    """The targets of guides for few steps, then a plot and a table for each model."""
    run = _run(found.run, "results/steps.json")
    parts = [f"{run} With the guides: {found.run.refreshes}.", targets(found)]
    for model in found.models:
        image = f"images/steps/{model}.png"
        save(curve(found, model), docs / image)
        parts += [f"### {model}", f"![Scores of {model} against passes]({image})",
                  curve_markdown(found, model)]  # fmt: skip
    return "\n\n".join(part.rstrip() for part in parts)


def targets(found: CurveResult, method: str = "few") -> str:
    """How near the guides for few steps come to CFG with the most steps, and their targets."""
    most = max(next(iter(found.models.values()))["cfg"], key=int)
    lines = [
        f"| relative to CFG, {most} steps | passes | top-1 | at least | fd_clip | at most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for steps, by_model in TARGETS.items():
        for model, methods in found.models.items():
            target = by_model.get(model, by_model.get(""))
            if target is None or steps not in methods.get(method, {}):
                continue
            point, cfg = methods[method][steps], methods["cfg"][most].scores
            share = percent(point.scores.top1 / cfg.top1)
            distance = point.scores.fd_clip / cfg.fd_clip
            lines.append(
                f"| {model}, {steps} steps | {point.passes:g} "
                f"| {share} | {percent(target[0])} | {distance:.2f} | {target[1]:g} |"
            )
    return "\n".join(lines)


def compare_page(found: ComparisonResult, docs: Path) -> str:
    """A plot and a table for each budget."""
    settings = found.settings
    parts = [
        _run(found.run, "results/compare.json")
        + f" Trained for {settings['max_train_steps']} steps of {settings['train_batch_size']} "
        "samples. *FLOPs* and *speed* are relative to CFG; *kept* is the share of CFG's gain "
        "in top-1 accuracy."
    ]
    for budget in found.budgets:
        image = f"images/compare/{budget}.png"
        save(pareto(found, budget), docs / image)
        plot = f"![CFG gain kept against cost]({image})"
        parts += [f"### {BUDGETS[budget]}", plot, comparison_markdown(found, budget)]
    return "\n\n".join(part.rstrip() for part in parts)


def _bash(commands: Sequence[str]) -> str:
    return "\n".join(["```bash", *commands, "```"])


def _run(run: Run, where: str) -> str:
    return (
        f"Measured by `{run.command}` on {run.machine}, seed {run.seed}, {run.samples:,} images "
        f"for each point, w = {run.guidance_scale:g}; the whole result is in `{where}`."
    )
