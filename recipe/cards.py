"""The last stage, ``cards``: a model card beside every model, naming source and licence."""

from __future__ import annotations

from pathlib import Path

ARTISTS = {
    "noto": ("Noto Emoji", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji"),
    "fluent": ("Fluent Emoji", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji"),
    "twemoji": (
        "Twemoji", "Twitter, Inc. and other contributors", "CC-BY-4.0",
        "https://github.com/twitter/twemoji",
    ),
    "emojione": ("EmojiOne", "EmojiOne", "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo"),
}  # fmt: skip
# artists of whom no picture is carried, but a fine-tune on which guides have practised
PRACTICE = {
    "noto-v1": (
        "the first Noto Emoji", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
    ),
    "fxemoji": ("FxEmojis", "Mozilla", "Apache-2.0", "https://github.com/mozilla/fxemoji"),
}  # fmt: skip

CARD = """---
license: {licence}
library_name: {library}
tags: [pilotfish]
---

# {title}

{text}

{made} on pictures of

{sources}
"""


def source(style: str) -> str:
    """One line of attribution."""
    name, author, licence, link = (ARTISTS | PRACTICE)[style]
    return f"- [{name}]({link}) by {author}, {licence}, drawn at 64x64 on white"


def write_cards(target: Path) -> None:
    """Write README.md into every model's folder and every folder of pictures."""
    everyone = tuple(ARTISTS)

    def card(folder: str, title: str, text: str, stage: str, styles: tuple[str, ...],
             licence: str, library: str = "diffusers", seed: int = 0) -> None:  # fmt: skip
        sources = "\n".join(source(s) for s in styles)
        made = f"Trained by the recipe of Pilotfish (`python -m recipe {stage}`, seed {seed})"
        if library == "pilotfish":
            made = (
                "Trained in several turns, which docs/recipe.md tells (`python -m recipe "
                f"{stage}` makes one of its form),"
            )
        (target / folder / "README.md").write_text(
            CARD.format(
                title=title, text=text, made=made, sources=sources,
                licence=licence, library=library,
            )
        )  # fmt: skip

    card(
        "base", "Pilotfish base",
        "A small Stable Diffusion (64x64 pictures, 8x8x8 latents, v prediction) that draws "
        "429 things in the style of Noto Emoji. Its autoencoder has seen all four styles.",
        "base", everyone, "cc-by-4.0",
    )  # fmt: skip
    card("fluent", "Pilotfish base, Fluent style", "A full fine-tune of the base's UNet.",
         "finetunes", ("fluent",), "mit")  # fmt: skip
    card("twemoji", "Pilotfish base, Twemoji style", "A full fine-tune of the base's UNet.",
         "finetunes", ("twemoji",), "cc-by-4.0")  # fmt: skip
    card("emojione-lora", "Pilotfish base, EmojiOne style", "A LoRA for the base's UNet.",
         "finetunes", ("emojione",), "cc-by-4.0")  # fmt: skip
    for name in sorted(p.name for p in (target / "practice").glob("*") if p.is_dir()):
        drawn = "" if name in PRACTICE else ", redrawn (`recipe/augment.py`)"
        card(
            f"practice/{name}", f"Pilotfish base, to practise on: {name}",
            "A LoRA for the base's UNet, quickly made, for guides to practise on. No guide is "
            f"measured on it. Its pictures are those below{drawn}.",
            "practice", (name if name in PRACTICE else "noto",), "apache-2.0",
        )  # fmt: skip
    card(
        "judge", "Pilotfish judge",
        "A small CLIP over four styles of emoji. It takes no part in training a guide.",
        "judge", everyone, "cc-by-4.0", "transformers", 1,
    )  # fmt: skip
    for guide in sorted(p.name for p in (target / "guides").glob("*") if p.is_dir()):
        _, _, steps = guide.partition("-")
        few = (
            f" Taught to take {steps} steps of DDIM where classifier-free guidance takes "
            f"{2 * int(steps)}; it is for those alone."
            if steps else ""
        )  # fmt: skip
        card(
            f"guides/{guide}", f"Pilotfish guide, {guide}",
            "Stands in for the second pass of classifier-free guidance on the Pilotfish base "
            f"and on its fine-tunes.{few} Distilled from text prompts, as the base and practice "
            "fine-tunes sample them; no picture took part but those that these were trained on.",
            "steps" if steps else "guides", ("noto", *PRACTICE), "apache-2.0", "pilotfish",
        )  # fmt: skip
    for style in ARTISTS:
        lines = f"# Pictures\n\n{source(style)}\n\nDrawn by `python -m recipe pictures`.\n"
        (target / "pictures" / style / "README.md").write_text(lines)
