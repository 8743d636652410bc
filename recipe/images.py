"""Stage ``images``: pinned icon sets from the npm registry, rendered at 64x64 on white."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from recipe.vocabulary import caption, categories

SIZE = 64


@dataclass(frozen=True)
class Style:
    """An icon set: where it is from and what it may be used for.

    Attributes:
        package: npm package; npm verifies the integrity of what it fetches.
    """

    name: str
    author: str
    licence: str
    url: str
    package: str
    version: str

    @property
    def attribution(self) -> str:
        """A line of Markdown."""
        return (
            f"[{self.name}]({self.url}) by {self.author}, {self.licence}, drawn at 64x64 on white"
        )


STYLES = {
    "noto": Style(
        "Noto Emoji", "Google", "Apache-2.0", "https://github.com/googlefonts/noto-emoji",
        "@iconify-json/noto", "1.2.9",
    ),
    "fluent": Style(
        "Fluent Emoji", "Microsoft", "MIT", "https://github.com/microsoft/fluentui-emoji",
        "@iconify-json/fluent-emoji-flat", "1.2.6",
    ),
    "twemoji": Style(
        "Twemoji", "Twitter, Inc. and other contributors", "CC-BY-4.0",
        "https://github.com/twitter/twemoji", "@iconify-json/twemoji", "1.2.5",
    ),
    "emojione": Style(
        "EmojiOne", "EmojiOne", "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo",
        "@iconify-json/emojione", "1.2.3",
    ),
}  # fmt: skip
"""The styles of the base and its fine-tunes. Each has every name."""

TRAIN_STYLES = {
    "noto-v1": Style(
        "the first Noto Emoji", "Google", "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji", "@iconify-json/noto-v1", "1.2.5",
    ),
    "fxemoji": Style(
        "FxEmojis", "Mozilla", "Apache-2.0", "https://github.com/mozilla/fxemoji",
        "@iconify-json/fxemoji", "1.2.2",
    ),
}  # fmt: skip
"""Styles for fine-tune augmentation. Their images are not bundled, and names may be missing."""

TEST_STYLES = {
    "high-contrast": Style(
        "Fluent Emoji High Contrast", "Microsoft", "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6",
    ),
    "monotone": Style(
        "EmojiOne (Monotone)", "EmojiOne", "CC-BY-4.0", "https://github.com/EmojiTwo/emojitwo",
        "@iconify-json/emojione-monotone", "1.2.1",
    ),
    "streamline": Style(
        "Streamline Emojis", "Streamline", "CC-BY-4.0",
        "https://github.com/webalys-hq/streamline-vectors", "@iconify-json/streamline-emojis",
        "1.2.4",
    ),
}  # fmt: skip
"""Styles far from the base's, for evaluation: no guide is trained on them. Their images are
not bundled, and names may be missing."""


def fetch(style: Style) -> dict[str, Any]:
    """The IconifyJSON of a style's npm package."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{style.package}@{style.version}"]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(Path(folder) / name.stdout.split()[-1]) as archive:
            member = archive.extractfile("package/icons.json")
            if member is None:
                raise ValueError(f"{style.package}@{style.version} has no icons.json")
            icons: dict[str, Any] = json.load(member)
            return icons


def render(icons: dict[str, Any], name: str) -> Image.Image:
    """One icon on white, SIZE x SIZE."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    box = [icon.get(k, icons.get(k, d)) for k, d in
           (("left", 0), ("top", 0), ("width", 16), ("height", 16))]  # fmt: skip
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def make_images(target: Path, styles: Iterable[str] = tuple(STYLES)) -> None:
    """Render the vocabulary in every style: ``target/<style>/<name>.webp`` and metadata.jsonl.

    Raises:
        KeyError: one of :data:`STYLES` lacks a name.
    """
    for key in styles:
        folder = target / key
        folder.mkdir(parents=True, exist_ok=True)
        icons = fetch((STYLES | TRAIN_STYLES | TEST_STYLES)[key])
        rows = []
        for category, names in categories().items():
            for name in names:
                if key not in STYLES and name not in icons["icons"] | icons.get("aliases", {}):
                    continue
                render(icons, name).save(folder / f"{name}.webp", lossless=True, method=6)
                row = {"file_name": f"{name}.webp", "text": caption(name), "category": category}
                rows.append(row)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{key}: {len(rows)} images")
