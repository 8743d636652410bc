"""``python -m recipe STAGE``: one command a stage, resumable by the same command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from pilotfish.training.precision import imitates_half_precision
from recipe.autoencoder import AutoencoderStage, make_autoencoder
from recipe.cards import write_cards
from recipe.denoiser import BaseStage, make_base
from recipe.finetunes import (
    FAR,
    PRACTICE,
    STYLES,
    distances,
    far_folder,
    finetune_folder,
    make_finetune,
)
from recipe.guides import StepGuides, make_guide, make_step_guides
from recipe.judge import JudgeStage, make_judge
from recipe.pages import write_pages
from recipe.pictures import PRACTICE_STYLES, make_pictures
from recipe.pictures import STYLES as PICTURE_STYLES
from recipe.prompts import make_prompts
from recipe.readme import write_readme
from recipe.variants import VariantsStage, compare_variants

STAGES = (
    "prompts", "pictures", "autoencoder", "base", "finetunes", "practice", "judge", "guides",
    "steps", "cards",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Make the embedded model. Stages, in order: prompts, pictures, autoencoder, base,
    finetunes, practice, judge, guides, steps, cards. Beside them, variants compares forms of the
    guide; readme and pages put what was measured into the README and the documents; screenshots
    shows the app in docs/images."""

    stage: tyro.conf.Positional[
        Literal[
            "prompts",
            "pictures",
            "autoencoder",
            "base",
            "finetunes",
            "practice",
            "judge",
            "guides",
            "steps",
            "cards",
            "variants",
            "readme",
            "pages",
            "screenshots",
            "all",
        ]
    ]
    work: Path = Path("runs/recipe")
    """Checkpoints of the stages, and the autoencoder on its own."""
    target: Path = Path("assets/pilotfish_models")
    """Where the finished models go."""
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    base: BaseStage = field(default_factory=BaseStage)
    judge: JudgeStage = field(default_factory=JudgeStage)
    styles: tuple[str, ...] = tuple(STYLES)
    """Which fine-tunes the stage of that name makes."""
    practice: tuple[str, ...] = tuple(PRACTICE)
    """Which fine-tunes to practise on the stage of that name makes."""
    guides: tuple[str, ...] = ("tiny",)
    """Which guides the stage of that name distils: tiny, which is carried; full."""
    steps: StepGuides = field(default_factory=StepGuides)
    bf16: bool = not imitates_half_precision()
    """Train denoisers and guides in mixed precision: faster where the processor has the
    arithmetic for it, and much slower where it has not. The carried models were made with it, but
    for the practice fine-tunes."""
    variants: VariantsStage = field(default_factory=VariantsStage)


def run(recipe: Recipe) -> None:
    """Run one stage, or all of them."""
    pictures, vae = recipe.target / "pictures", recipe.work / "vae"
    for stage in STAGES if recipe.stage == "all" else (recipe.stage,):
        if stage == "prompts":
            make_prompts(recipe.target / "prompts")
        elif stage == "pictures":
            make_pictures(pictures, PICTURE_STYLES)
        elif stage == "autoencoder":
            make_autoencoder(pictures, recipe.work, vae, recipe.autoencoder)
        elif stage == "base":
            make_base(
                pictures, vae, recipe.work, recipe.target / "base", recipe.base, bf16=recipe.bf16
            )  # fmt: skip
        elif stage == "finetunes":
            for style in recipe.styles:
                make_finetune(
                    style, pictures, recipe.target / "base", recipe.work,
                    finetune_folder(recipe.target, style),
                    STYLES[style], bf16=recipe.bf16,
                )  # fmt: skip
        elif stage == "practice":
            drawn = recipe.work / "pictures"
            make_pictures(drawn, PRACTICE_STYLES, whole=False)
            for style in recipe.practice:
                make_finetune(
                    style, pictures if PRACTICE[style].restyle else drawn,
                    recipe.target / "base", recipe.work, finetune_folder(recipe.target, style),
                    PRACTICE[style], bf16=recipe.bf16,
                )  # fmt: skip
            for style, learnt in FAR.items():
                make_finetune(
                    style, pictures, recipe.target / "base", recipe.work,
                    far_folder(recipe.work, style), learnt, bf16=recipe.bf16,
                )  # fmt: skip
            for style, far in distances(recipe.target, recipe.work).items():
                print(f"{style} lies {far:.0%} of the length of the base's weights away")
        elif stage == "judge":
            make_judge(pictures, recipe.work, recipe.target / "judge", recipe.judge)
        elif stage == "guides":
            for name in recipe.guides:
                make_guide(name, recipe.work, recipe.target, bf16=recipe.bf16)
        elif stage == "steps":
            make_step_guides(recipe.work, recipe.target, recipe.steps, bf16=recipe.bf16)
        elif stage == "variants":
            compare_variants(recipe.work, recipe.variants)
        elif stage == "readme":
            write_readme(Path("README.md"), Path("results/guide.json"))
        elif stage == "pages":
            write_pages(Path("results"), Path("docs"))
        elif stage == "screenshots":
            from recipe.screenshots import take_screenshots  # which needs gradio and a browser

            take_screenshots(Path("docs/images"))
        else:
            write_cards(recipe.target)


if __name__ == "__main__":
    run(tyro.cli(Recipe, prog="python -m recipe", use_underscores=True))
