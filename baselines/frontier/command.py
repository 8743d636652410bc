"""``pilotfish compare --frontier``: the gain that each method keeps, by its number of passes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import tyro

from baselines.frontier.report import frontier_markdown, frontier_plot, groups
from baselines.frontier.results import FrontierRun
from baselines.frontier.run import Frontier, FrontierConfig, settings_of
from pilotfish import bundled
from pilotfish.cli.names import Dtype, model_sources, open_guide, open_scorer, split_name
from pilotfish.cli.progress import progress_bars
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation.plots import save
from pilotfish.evaluation.processes import process
from pilotfish.evaluation.results import GuideSize, machine, versions
from pilotfish.guides import Guide

STEPS = ("", "-16", "-8", "-4")
"""The bundled guides that are measured, as far as they are there: the base's for any number of
steps and for so many."""


@dataclass(frozen=True)
class FrontierCommand(FrontierConfig):
    """Measure guides with refreshes and other methods at several numbers of denoiser passes, on the
    base and its fine-tunes. The same command resumes it, and commands for parts of it (--models,
    --methods, --refresh) add to one result. All methods use the deterministic scheduler."""

    models: tuple[str, ...] = ()
    """Bundled models, or folders or hub ids. Default: the base, its fine-tunes and its far
    fine-tunes."""
    base: str = "base"
    """The model on which LinearAG is fitted and the cost is measured: base, sd3, or a folder or hub
    id."""
    guides: tuple[str, ...] = ()
    """Guides of this library, NAME, PATH or NAME=PATH. Default: the bundled ones."""
    trained: tuple[str, ...] = ()
    """Guides of trained baselines, likewise: agd=runs/compare/agd/samples-0/guide."""
    reference_images: tuple[str, ...] = ()
    """Folders of real images (metadata.jsonl), one for each model that is not bundled."""
    prompts: str | None = None
    """Text file, the prompts of the images; the scorer must find each among all of them. Default:
    the bundled captions."""
    train_prompts: str | None = None
    """Text file of prompts on which LinearAG is fitted. Default: the bundled ones for training."""
    dtype: Dtype = "float32"
    """Precision of the models."""
    scorer: str | None = None
    """Folder of a CLIP that scores the images. Default: the bundled one."""
    output: str = "results/frontier.json"
    """File of the result."""
    plot: str = "docs/images/frontier.png"
    """File of the plot."""
    references: str = "runs/frontier"
    """Folder for the images of no guidance and CFG, which are sampled once."""


def main(arguments: Sequence[str]) -> None:
    """Run ``pilotfish compare --frontier``."""
    given = [a for a in arguments if a != "--frontier"]
    config = tyro.cli(
        FrontierCommand, args=given, prog="pilotfish compare --frontier", use_underscores=True,
        description=FrontierCommand.__doc__,
    )  # fmt: skip
    if process()[1] > 1:
        raise ValueError("--frontier runs in one process; its parts can run one after another")
    own = [f"{bundled.guide_of(config.base)}{steps}" for steps in STEPS]
    there = bundled.guide_names()
    guides = _guides(config.guides or [name for name in own if name in there])
    far = bundled.test_finetune_names() if config.base == "base" else []
    if config.base in bundled.BASES:
        models = config.models or (*bundled.BASES[config.base], *far)
    elif config.guides:
        models = config.models or (config.base,)
    else:
        raise ValueError("--guides is needed with a base of your own")
    names = load_prompts(config.prompts) if config.prompts else bundled.prompts("captions")
    sources = model_sources(models, config.reference_images, config.dtype)
    base = model_sources([config.base], (), config.dtype).popitem()
    pipe = base[1].load()
    sizes = {name: GuideSize.of(guide, pipe, name) for name, guide in guides.items()}
    run = FrontierRun(
        prompts=f"{crc32(repr(names).encode()):08x}", versions=versions(), dtype=config.dtype,
        guides=sizes, **settings_of(config),
    )  # fmt: skip
    with progress_bars() as progress:
        frontier = Frontier(
            config, sources, base, guides, _guides(config.trained),
            open_scorer(config.scorer, models), names,
            load_prompts(config.train_prompts) if config.train_prompts
            else bundled.prompts("training"),
            run, shlex.join(["pilotfish", "compare", *arguments]), machine(), Path(config.output),
            Path(config.references), progress, test_models=far,
        )  # fmt: skip
        found = frontier.measure()
    columns = groups(found, base[0], far)
    print(frontier_markdown(found, columns))
    save(frontier_plot(found, columns, list(guides)), config.plot)
    print(f"saved {config.output} and {config.plot}")


def _guides(texts: Sequence[str]) -> dict[str, Guide]:
    """Guides by name.

    Raises:
        ValueError: two of one name.
    """
    found: dict[str, Guide] = {}
    for name, path in map(split_name, texts):
        if name in found:
            raise ValueError(f"two guides are called {name}; name one of them NAME=PATH")
        found[name] = open_guide(path)
    return found
