"""``pilotfish card``: a model card beside a guide, and both on the Hugging Face hub."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from huggingface_hub import EvalResult

from pilotfish.backbones import portable_path
from pilotfish.evaluation.results import Result
from pilotfish.evaluation.tables import LEGEND, markdown_table
from pilotfish.guides import Guide
from pilotfish.guides.card import model_card
from pilotfish.guides.hub import CARD, digests, published, upload
from pilotfish.training.history import describe_training, training_folder

RESULT, GRID = "result.json", "grid.png"
"""Names of the copies beside the card."""


@dataclass(frozen=True)
class CardConfig:
    """Write README.md into a guide's folder, for the Hugging Face hub: the base, how to use the
    guide, what was measured, how it was trained, the weights' SHA-256. No path of this machine
    goes in. With --push_to_hub, upload configuration, weights, card and what the card links to;
    a card that is there already is uploaded as it is, unless another option asks for a new one.
    ``hf auth login`` says who you are."""

    guide: str
    """The guide's folder."""
    result: str | None = None
    """What ``pilotfish evaluate --output`` wrote of this guide; a copy goes beside the card."""
    grid: str | None = None
    """What ``pilotfish evaluate --grid`` drew; a copy goes beside the card."""
    base_model: str | None = None
    """Hub id of the base. Left out: the name in the guide's configuration."""
    revision: str | None = None
    """The base's commit. Left out: the one in the guide's configuration."""
    license: str | None = None
    """The guide's, as the hub names it, such as apache-2.0."""
    training: str | None = None
    """The folder of its training. Left out: the parent of the guide's folder."""
    push_to_hub: str | None = None
    """Repository to upload to, owner/name; it is created if it does not exist."""
    commit_message: str | None = None
    private: bool = False
    """Make a new repository private."""
    create_pr: bool = False
    """Open a pull request in place of a commit."""
    dry_run: bool = False
    """Write the card and list what --push_to_hub would upload, without any network."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(CardConfig, args=list(arguments), prog="pilotfish card", use_underscores=True)
    folder = Path(config.guide)
    if not folder.is_dir():
        raise ValueError(f"--guide {folder} is no folder; a card is written beside a guide")
    guide = Guide.from_pretrained(folder)  # a guide that cannot be read is not published
    asked = (config.result, config.grid, config.base_model, config.revision, config.license,
             config.training)  # fmt: skip
    if config.push_to_hub is None or any(asked) or not (folder / CARD).is_file():
        _write(config, folder, guide)
        print(f"saved {folder / CARD}")
    if config.dry_run:
        for name in published(folder):
            print(f"{name}  {(folder / name).stat().st_size:,} bytes")
    elif config.push_to_hub is not None:
        address = upload(
            folder, config.push_to_hub, commit_message=config.commit_message,
            private=config.private or None, create_pr=config.create_pr,
        )  # fmt: skip
        print(f"pushed to {address}")


def _write(config: CardConfig, folder: Path, guide: Guide) -> None:
    result = portable(Result.load(config.result)) if config.result else None
    if result is not None and result.guide.parameters != guide.num_parameters():
        raise ValueError(
            f"{config.result} is of a guide with {result.guide.parameters:,} parameters, and this "
            f"one has {guide.num_parameters():,}"
        )
    training = Path(config.training) if config.training else training_folder(folder)
    card = model_card(
        guide, digests(folder), base_model=config.base_model, revision=config.revision,
        licence=config.license, repo_id=config.push_to_hub, grid=GRID if config.grid else None,
        measured=measured(result, RESULT) if result else "",
        results=eval_results(result) if result else (),
        trained=describe_training(training) if training else "",
    )  # fmt: skip
    if config.grid and Path(config.grid).resolve() != (folder / GRID).resolve():
        shutil.copyfile(config.grid, folder / GRID)
    if result is not None:
        result.save(folder / RESULT)
    card.save(folder / CARD)


def portable(result: Result) -> Result:
    """The same without the paths of the machine that measured: their last parts are left."""
    words = map(_portable, shlex.split(result.run.command))
    return replace(
        result,
        run=replace(result.run, command=shlex.join(words)),
        guide=replace(result.guide, name=portable_path(result.guide.name)),
    )


def measured(result: Result, file: str) -> str:
    """The table in Markdown, and how to repeat it; ``file`` is the whole result, beside the
    card."""
    run, guide = result.run, result.guide
    return (
        f"{markdown_table(result)}\n"
        f"Measured by `{run.command}` on {run.machine}, seed {run.seed}, {run.samples:,} images "
        f"for each model and mode, {run.num_inference_steps} steps, {run.refreshes}; the whole "
        f"result is in [{file}]({file}). The guide has {guide.share:.2%} of the denoiser's "
        f"parameters. {LEGEND}"
    )


def eval_results(result: Result) -> list[EvalResult]:
    """The same for the card's header, without what is not a number."""
    return [
        EvalResult(
            task_type="text-to-image", dataset_type=model,
            dataset_name=f"{result.run.samples} images of {model}, "
            f"w = {result.run.guidance_scale:g}",
            metric_type=metric, metric_name=name, metric_value=round(value, 4),
        )
        for model, metric, name, value in _figures(result)
        if math.isfinite(value)
    ]  # fmt: skip


def _figures(result: Result) -> Iterator[tuple[str, str, str, float]]:
    for name, model in result.models.items():
        yield name, "guidance_error", "guidance error", model.guidance_error.mean
        if model.scores["cfg"].top1 > model.scores["none"].top1:  # else CFG gains nothing
            yield name, "gain_kept", "CFG gain kept", model.gain_kept
        yield name, "top1", "top-1 retrieval accuracy", model.scores["guided"].top1


def _portable(word: str) -> str:
    """One word of a command line, where a path may follow ``flag=``."""
    flag, joined, value = word.rpartition("=")
    return flag + joined + portable_path(value)
