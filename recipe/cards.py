"""Stage ``cards``: a model card in the folder of every model and of every style's images."""

from __future__ import annotations

from pathlib import Path

from pilotfish.bundled import STEP_LORA
from recipe.finetunes import STYLES as FINETUNES
from recipe.finetunes import TEST_FINETUNES, TRAIN_FINETUNES, BaseName, finetune_folder
from recipe.images import STYLES, TEST_STYLES, TRAIN_STYLES

CARD = """---
license: {licence}
library_name: {library}
tags: [pilotfish]
---

# {title}

{text}

{made} on images of

{sources}
"""
REPRODUCIBLE = "Trained by the recipe of Pilotfish (`python -m recipe {stage}`, seed {seed})"
GUIDES_MADE = (
    f"{REPRODUCIBLE}, in bfloat16 mixed precision with torch 2.13.0, diffusers 0.42.1 and "
    "accelerate 1.15.0,"
)
"""How the bundled guides were made: to be changed when they are made anew."""

BASES: dict[BaseName, str] = {"base": "Pilotfish base", "sd3": "Pilotfish SD3"}
DENOISERS = {"base": "the base's UNet", "sd3": "the transformer of Pilotfish SD3"}
THE = {"base": "the Pilotfish base", "sd3": "Pilotfish SD3"}
SOLVERS = {"base": "DDIM", "sd3": "Euler"}


def write_cards(target: Path) -> None:
    """Write every README.md below ``target``."""

    def card(
        folder: str, title: str, text: str, *, stage: str, styles: tuple[str, ...], licence: str,
        library: str = "diffusers", made: str = REPRODUCIBLE, seed: int = 0,
    ) -> None:  # fmt: skip
        known = STYLES | TRAIN_STYLES | TEST_STYLES
        sources = "\n".join(f"- {known[style].attribution}" for style in styles)
        (target / folder / "README.md").write_text(
            CARD.format(
                licence=licence, library=library, title=title, text=text, sources=sources,
                made=made.format(stage=stage, seed=seed),
            )
        )  # fmt: skip

    card(
        "base", "Pilotfish base",
        "A small Stable Diffusion (64x64 images, 8x8x8 latents, v prediction) that draws 429 "
        "things in the style of Noto Emoji. Its autoencoder was trained on all four styles.",
        stage="base", styles=tuple(STYLES), licence="cc-by-4.0",
    )  # fmt: skip
    if (target / "sd3").is_dir():  # not made by `all`
        card(
            "sd3", "Pilotfish SD3",
            "A small Stable Diffusion 3 (64x64 images, 8x8x8 latents, flow matching) that draws "
            "429 things in the style of Noto Emoji. Its autoencoder is the base's. The output of "
            "its T5 encoder is zero.",
            stage="sd3", styles=tuple(STYLES), licence="cc-by-4.0",
        )  # fmt: skip
    titles = {"fluent": "Fluent", "twemoji": "Twemoji", "emojione": "EmojiOne"}
    for base, title in BASES.items():
        model = "" if base == "base" else f" --model {base}"
        for style, stage in FINETUNES[base].items():
            folder = finetune_folder(target, style, base)
            if not folder.is_dir():
                continue
            card(
                folder.name, f"{title}, {titles[style]} style",
                f"{'A LoRA for' if stage.rank else 'A full fine-tune of'} {DENOISERS[base]}.",
                stage=f"finetunes{model}", styles=(style,),
                licence="mit" if style == "fluent" else "cc-by-4.0",
            )  # fmt: skip
        for name in TRAIN_FINETUNES:
            folder = finetune_folder(target, name, base)
            if not folder.is_dir():
                continue
            restyled = "" if name in TRAIN_STYLES else ", restyled (`recipe/augment.py`)"
            card(
                f"train_finetunes/{folder.name}", f"{title}, fine-tune for augmentation: {name}",
                f"A LoRA for {DENOISERS[base]}, trained for few steps, for fine-tune augmentation "
                "while a guide is trained. No guide is measured on it. Its images are those "
                f"below{restyled}.",
                stage=f"train_finetunes{model}",
                styles=(name if name in TRAIN_STYLES else "noto",), licence="apache-2.0",
            )  # fmt: skip
    for name in _folders(target / "test_finetunes"):
        kind = "A LoRA for" if TEST_FINETUNES[name].rank else "A full fine-tune of"
        card(
            f"test_finetunes/{name}", f"Pilotfish base, fine-tune for tests: {name}",
            f"{kind} the base's UNet, far from the base in weights and in style. It is for "
            "evaluation: no guide was trained on it.",
            stage="test_finetunes", styles=(name,), licence=TEST_STYLES[name].licence.lower(),
        )  # fmt: skip
    if (target / STEP_LORA).is_dir():
        card(
            STEP_LORA, "Pilotfish base, 4 steps",
            "A LoRA for the base's UNet with which it draws in 4 DDIM steps, distilled from 16 of "
            "the base without guidance. CFG and guides work on it as on the base; no guide was "
            "trained on it.",
            stage="step_lora", styles=("noto",), licence="apache-2.0",
        )  # fmt: skip
    card(
        "scorer", "Pilotfish scorer",
        "A small CLIP over four styles of emoji. It takes no part in training a guide.",
        stage="scorer", styles=tuple(STYLES), licence="cc-by-4.0", library="transformers", seed=1,
    )  # fmt: skip
    for name in _folders(target / "guides"):
        base = "sd3" if name.startswith("sd3-") else "base"
        last = name.rpartition("-")[2]
        steps, solver = int(last) if last.isdecimal() else 0, SOLVERS[base]
        few = (
            f" For {steps} {solver} steps, distilled from classifier-free guidance with "
            f"{2 * steps}." if steps else ""
        )  # fmt: skip
        model = "" if base == "base" else f" --model {base}"
        card(
            f"guides/{name}", f"Pilotfish guide, {name}",
            f"Replaces the second pass of classifier-free guidance on {THE[base]} and its "
            f"fine-tunes.{few} Distilled from text prompts, along trajectories of the base and of "
            "fine-tunes of it; no image was used except those that these were trained on.",
            stage=("step_guides" if steps else "guides") + model, styles=("noto", *TRAIN_STYLES),
            licence="apache-2.0", library="pilotfish", made=GUIDES_MADE,
        )  # fmt: skip
    for name, source in STYLES.items():
        text = f"# Images\n\n- {source.attribution}\n\nRendered by `python -m recipe images`.\n"
        (target / "images" / name / "README.md").write_text(text)


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*") if p.is_dir())
