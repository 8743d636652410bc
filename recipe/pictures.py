"""Stage 1, ``pictures``: pinned icon sets from the npm registry, drawn at 64x64 on white."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from recipe.vocabulary import caption, categories

SIZE = 64
# style -> (npm package, version, licence); npm verifies the integrity of what it fetches
STYLES = {
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    "emojione": ("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
}

# artists on whose fine-tunes guides practise; their pictures are not carried, and they need not
# draw every name
PRACTICE_STYLES = {
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    "fxemoji": ("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
}


def fetch(package: str, version: str) -> dict[str, Any]:
    """The IconifyJSON of one npm package."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(Path(folder) / name.stdout.split()[-1]) as archive:
            member = archive.extractfile("package/icons.json")
            if member is None:
                raise ValueError(f"{package}@{version} holds no icons.json")
            icons: dict[str, Any] = json.load(member)
            return icons


def draw(icons: dict[str, Any], name: str) -> Image.Image:
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
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    page = Image.new("RGBA", drawn.size, "white")
    return Image.alpha_composite(page, drawn).convert("RGB")


def make_pictures(
    target: Path, styles: Mapping[str, tuple[str, str, str]], whole: bool = True
) -> None:
    """Draw the vocabulary in every style: ``target/<style>/<name>.webp`` and metadata.jsonl.

    Raises:
        KeyError: a style lacks a name, and the ``whole`` vocabulary is wanted.
    """
    for style, (package, version, _) in styles.items():
        folder = target / style
        folder.mkdir(parents=True, exist_ok=True)
        icons = fetch(package, version)
        rows = []
        for category, names in categories().items():
            for name in names:
                if not whole and name not in icons["icons"] | icons.get("aliases", {}):
                    continue
                draw(icons, name).save(folder / f"{name}.webp", lossless=True, method=6)
                row = {"file_name": f"{name}.webp", "text": caption(name), "category": category}
                rows.append(row)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        print(f"{style}: {len(rows)} pictures")
