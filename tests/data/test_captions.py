"""Prompt files of public benchmarks, as they are published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pilotfish.data.captions import load_captions, load_pairs


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_of_each_image_the_first_caption(tmp_path: Path) -> None:
    rows = [(9, 4, "late"), (3, 8, "second"), (3, 2, " the\nfirst "), (9, 5, "later")]
    annotations = [{"image_id": i, "id": n, "caption": text} for i, n, text in rows]
    text = json.dumps({"images": [], "annotations": annotations})
    assert load_captions(written(tmp_path, "captions.json", text)) == ["the first", "late"]


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("chosen.json", '{"20": "a cat ", "3": "a dog"}', ["a cat", "a dog"]),
        ("parti.tsv", 'Prompt\tCategory\tNote\n"A B" in paint\tx\t\nlife\ty\n',
         ['"A B" in paint', "life"]),
        ("drawbench.csv", 'Prompts,Category\nA red car.,c\n"One, ""two""",c\n',
         ["A red car.", 'One, "two"']),
        ("spaced.csv", "\ufeffCategory, Prompt\nc,cat\n", ["cat"]),
        ("lines.txt", "a cat\n\na dog\n", ["a cat", "a dog"]),
    ],
)  # fmt: skip
def test_formats(name: str, text: str, prompts: list[str], tmp_path: Path) -> None:
    assert load_captions(written(tmp_path, name, text)) == prompts


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", "[1]", "neither COCO's annotations nor"),
        ("a.json", "{", "no captions could be read"),
        ("a.json", "{}", "holds no caption"),
        ("a.json", '{"annotations": [{"id": 1}]}', "not {image_id, id, caption}: 'image_id'"),
        ("a.json", '{"1": " "}', "image 1: the text is blank"),
        ("a.tsv", "Words\tNote\nx\ty\n", "has no column prompt or prompts"),
        ("a.tsv", "Prompt\tNote\n", "holds no prompt"),
        ("a.tsv", "Note\tPrompt\nx\n", "row 2: the text is missing"),
        ("a.csv", "Words\nx\n", "has no column text"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    file = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        load_captions(file)
    assert str(file) in str(caught.value)


def test_pairs(tmp_path: Path) -> None:
    file = written(tmp_path, "pairs.csv", "prompt,negative_prompt\na street,cars\n")
    assert load_pairs(file) == [("a street", "cars")]
    with pytest.raises(ValueError, match="no column negative_prompt"):
        load_pairs(written(tmp_path, "half.csv", "prompt\na street\n"))
    with pytest.raises(ValueError, match="line 2: the text is blank"):
        load_pairs(written(tmp_path, "blank.csv", "prompt,negative_prompt\na street, \n"))
    with pytest.raises(ValueError, match="holds no pair"):
        load_pairs(written(tmp_path, "empty.csv", "prompt,negative_prompt\n"))
