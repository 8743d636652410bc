"""A guide's folder on the Hugging Face hub: what goes up, and that nothing else does."""

from __future__ import annotations

import json
import re
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors.torch import load_file

from pilotfish.errors import in_brief
from pilotfish.guides.card import model_card
from pilotfish.interface import GuideError

if TYPE_CHECKING:
    from pilotfish.guides.base import Guide

CARD = "README.md"
BESIDE = re.compile(r"\]\(([\w.-]+)\)")
"""Links of a card to files in its own folder."""
DIGEST = re.compile(r"\b[0-9a-f]{64}\b")


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of weights in a guide's folder, by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = file_digest(file, "sha256").hexdigest()
    return found


def add_card(guide: Guide, folder: Path, repo_id: str | None = None) -> None:
    """A card that tells nothing measured, where a guide's folder has none."""
    if not (folder / CARD).exists():
        model_card(guide, digests(folder), repo_id=repo_id).save(folder / CARD)


def published(folder: Path) -> list[str]:
    """The names of what goes up: configuration, weights, card, and the files beside it to which
    the card links.

    Raises:
        GuideError: there is no card, it links to what is not there, or it was written for other
            weights.
    """
    card = folder / CARD
    if not card.is_file():
        raise GuideError(f"{folder} has no {CARD}; pilotfish card --guide {folder} writes it")
    text, weights = card.read_text(encoding="utf-8"), digests(folder)
    stated = set(DIGEST.findall(text))
    if stated and not stated.issuperset(weights.values()):
        raise GuideError(f"{card} was written for other weights; run pilotfish card again")
    linked = set(BESIDE.findall(text))
    if missing := sorted(name for name in linked if not (folder / name).is_file()):
        raise GuideError(f"{card} links to {missing[0]}, which is not there")
    index = [p.name for p in folder.glob("*.safetensors.index.json")]
    return sorted({"config.json", CARD, *weights, *index, *linked})


def upload(
    folder: Path, repo_id: str, *, commit_message: str | None = None, private: bool | None = None,
    token: str | bool | None = None, create_pr: bool = False,
) -> str:  # fmt: skip
    """Put a guide's folder on the hub, :func:`published` and no more; the repository is made
    where there is none. See diffusers' ``push_to_hub``.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        GuideError: see :func:`published`.
        ValueError: ``repo_id`` is no hub id.
        OSError: the hub refuses, or cannot be reached.
    """
    validate_repo_id(repo_id)
    files = [CommitOperationAdd(name, folder / name) for name in published(folder)]
    api = HfApi(token=token)
    try:
        full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.create_commit(
            full, files, commit_message=commit_message or "Upload guide", create_pr=create_pr
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # of whichever HTTP library huggingface_hub is built on
        raise OSError(f"the hub cannot be reached: {in_brief(error)}") from error
    return commit.pr_url or commit.commit_url


def unchanged_folder(guide: Guide) -> Path | None:
    """The folder from which a guide was loaded, where it has a card and the very same weights and
    configuration."""
    folder = Path(guide.config.get("_name_or_path") or "")
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file() or not (folder / CARD).is_file():
        return None
    saved, mine = load_file(file), guide.state_dict()
    same = saved.keys() == mine.keys() and all(
        torch.equal(mine[k].cpu(), v.to(mine[k].dtype)) for k, v in saved.items()
    )
    config, own = (json.loads(text) for text in (
        (folder / CONFIG_NAME).read_text(encoding="utf-8"), guide.to_json_string()
    ))  # fmt: skip
    version = "_diffusers_version"
    return folder if same and {**config, version: ""} == {**own, version: ""} else None
