"""``python -m recipe STAGE``: one command a stage, resumed by the same command."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from recipe.ablations import AblationsStage, run_ablations
from recipe.autoencoder import AutoencoderStage, make_autoencoder
from recipe.batches import DenoiserStage
from recipe.cards import write_cards
from recipe.finetunes import (
    STYLES,
    TEST_FINETUNES,
    TRAIN_FINETUNES,
    BaseName,
    distances,
    make_finetune,
)
from recipe.guides import StepGuidesStage, make_guide, make_sizes, make_step_guides
from recipe.images import TEST_STYLES, TRAIN_STYLES, make_images
from recipe.pages import draw_grid, write_pages
from recipe.quantization import QuantizationStage, measure_quantization
from recipe.scorer import ScorerStage, make_scorer
from recipe.sd3 import make_sd3
from recipe.step_lora import StepLoraStage, make_step_lora
from recipe.transformer import compose
from recipe.unet import make_base
from recipe.vocabulary import write_prompts


@dataclass(frozen=True)
class Recipe:
    """Make the bundled models. ``all`` runs prompts, images, autoencoder, base, finetunes,
    train_finetunes, test_finetunes, scorer, guides, step_guides and step_lora, in this order; then
    sd3, a Stable Diffusion 3, and with --model sd3 the four stages of its fine-tunes and guides;
    then cards. The other stages are not part of the models: ablations compares forms of the guide;
    sizes trains guides of other sizes in --work/sizes; quantization compares guides that are
    trained on a quantised base; transformer puts the results of the Stable Diffusion 3's guide
    into one file; pages writes results into README and documents; screenshots shows the app in
    docs/images."""

    stage: tyro.conf.Positional[
        Literal[
            "prompts",
            "images",
            "autoencoder",
            "base",
            "finetunes",
            "train_finetunes",
            "test_finetunes",
            "scorer",
            "guides",
            "step_guides",
            "step_lora",
            "sd3",
            "cards",
            "ablations",
            "sizes",
            "quantization",
            "transformer",
            "pages",
            "screenshots",
            "all",
        ]
    ]
    work: Path = Path("runs/recipe")
    """Folder for checkpoints and for what is not bundled."""
    target: Path = Path("assets/pilotfish_models")
    """Folder for the finished models."""
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    base: DenoiserStage = field(default_factory=DenoiserStage)
    scorer: ScorerStage = field(default_factory=ScorerStage)
    model: BaseName = "base"
    """Whose fine-tunes and guides are trained: the UNet's or the Stable Diffusion 3's."""
    finetunes: tuple[str, ...] = tuple(STYLES["base"])
    """What the stage of that name trains."""
    train_finetunes: tuple[str, ...] = tuple(TRAIN_FINETUNES)
    """What the stage of that name trains."""
    test_finetunes: tuple[str, ...] = tuple(TEST_FINETUNES)
    """What the stage of that name trains."""
    guides: tuple[str, ...] = ("tiny",)
    """What the stage of that name trains: tiny, full."""
    step_guides: StepGuidesStage = field(default_factory=StepGuidesStage)
    step_lora: StepLoraStage = field(default_factory=StepLoraStage)
    ablations: AblationsStage = field(default_factory=AblationsStage)
    quantization: QuantizationStage = field(default_factory=QuantizationStage)
    bf16: bool | None = None
    """Train denoisers and guides in mixed precision. Default: where the processor has the
    arithmetic for it. The bundled models were trained with it, except the train_finetunes."""

    @property
    def images(self) -> Path:
        """The bundled images."""
        return self.target / "images"

    @property
    def vae(self) -> Path:
        """The autoencoder by itself."""
        return self.work / "vae"

    @property
    def mixed(self) -> bool:
        """``bf16``, or its default."""
        if self.bf16 is not None:
            return self.bf16
        from pilotfish.training.state import emulates_half_precision

        return not emulates_half_precision()


def _finetunes(r: Recipe) -> None:
    for name in r.finetunes:
        make_finetune(name, r.images, r.target, r.work, bf16=r.mixed, base=r.model)
    _print_distances(r, r.finetunes)


def _train_finetunes(r: Recipe) -> None:
    rendered = r.work / "images"
    make_images(rendered, TRAIN_STYLES)
    for name in r.train_finetunes:
        images = rendered if name in TRAIN_STYLES else r.images
        make_finetune(name, images, r.target, r.work, bf16=r.mixed, base=r.model)
    _print_distances(r, r.train_finetunes)


def _test_finetunes(r: Recipe) -> None:
    if r.model != "base":
        raise ValueError("test_finetunes are trained on base alone; leave --model out")
    rendered = r.work / "images"
    make_images(rendered, TEST_STYLES)
    for name in r.test_finetunes:
        make_finetune(name, rendered, r.target, r.work, bf16=r.mixed)
    _print_distances(r, r.test_finetunes)


def _print_distances(r: Recipe, names: Iterable[str]) -> None:
    for name, distance in distances(r.target, names, r.model).items():
        print(f"{name}: change of {distance:.0%} of the norm of the base's weights")


def _guides(r: Recipe) -> None:
    for name in r.guides:
        make_guide(name, r.work, r.target, bf16=r.mixed, base=r.model)


def _screenshots(r: Recipe) -> None:
    from recipe.screenshots import take_screenshots  # needs gradio and a browser

    take_screenshots(Path("docs/images"))


def _pages(r: Recipe) -> None:
    write_pages(Path())
    if Path("results/frontier.json").is_file():  # or the README shows other columns
        for base, name in (("base", "grid"), ("sd3", "grid-sd3")):
            draw_grid(Path("docs/images") / f"{name}.png", base)


STAGES: dict[str, Callable[[Recipe], None]] = {
    "prompts": lambda r: write_prompts(r.target / "prompts"),
    "images": lambda r: make_images(r.images),
    "autoencoder": lambda r: make_autoencoder(r.images, r.work, r.vae, r.autoencoder),
    "base": lambda r: make_base(
        r.images, r.vae, r.work, r.target / "base", r.base, bf16=r.mixed
    ),
    "finetunes": _finetunes,
    "train_finetunes": _train_finetunes,
    "test_finetunes": _test_finetunes,
    "scorer": lambda r: make_scorer(r.images, r.work, r.target / "scorer", r.scorer),
    "guides": _guides,
    "step_guides": lambda r: make_step_guides(
        r.work, r.target, r.step_guides, bf16=r.mixed, base=r.model
    ),
    "step_lora": lambda r: make_step_lora(
        r.images, r.target, r.work, r.step_lora, bf16=r.mixed
    ),
    "sd3": lambda r: make_sd3(r.target / "base", r.images, r.work, r.target / "sd3", bf16=r.mixed),
    "cards": lambda r: write_cards(r.target),
    "ablations": lambda r: run_ablations(r.work, r.ablations, bf16=r.mixed),
    "sizes": lambda r: make_sizes(r.work / "sizes", r.target, bf16=r.mixed),
    "quantization": lambda r: measure_quantization(r.work, r.quantization, bf16=r.mixed),
    "transformer": lambda r: compose(Path("results/sd3")).save("results/transformer.json"),
    "pages": _pages,
    "screenshots": _screenshots,
}  # fmt: skip
ALL: list[tuple[str, BaseName]] = [
    *((name, "base") for name in itertools.takewhile(lambda name: name != "sd3", STAGES)),
    ("sd3", "sd3"), ("finetunes", "sd3"), ("train_finetunes", "sd3"), ("guides", "sd3"),
    ("step_guides", "sd3"), ("cards", "base"),
]  # fmt: skip
"""The stages of ``all``, in order, and the base of each."""


def main(recipe: Recipe) -> None:
    """Run one stage, or all."""
    for name, model in ALL if recipe.stage == "all" else [(recipe.stage, recipe.model)]:
        STAGES[name](replace(recipe, model=model))


if __name__ == "__main__":
    main(tyro.cli(Recipe, prog="python -m recipe", use_underscores=True))
