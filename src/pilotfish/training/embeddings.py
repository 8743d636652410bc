"""Embeddings of prompts on a disk, by their content: each text is encoded at most once.

A folder holds a subfolder for each set of text encoders, named by the SHA-256 of everything that an
embedding depends on beside the text. It has safetensors files of some texts each, whose metadata
lists the SHA-256 of every row's text. Files are written under a temporary name and renamed, so an
interrupted sweep continues where it was, and runs may share a folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pilotfish.backbones import Backbone
from pilotfish.conditioning import Prompts, Role, batches, encode_as, encoded
from pilotfish.interface import TextConditions
from pilotfish.teacher import checksum
from pilotfish.training.config import ConfigError

ROWS = "rows"
"""The key of the rows' texts in the metadata of a file."""
OPEN_FILES = 128
_PLACES = ("_name_or_path", "transformers_version")
"""Entries of a text encoder's configuration that do not change what it computes."""


def cached_prompts(
    pipe: Any, texts: Sequence[str], folder: str | Path, device: torch.device,
    log: Callable[[str], None] = print, offload: bool = False,
) -> Prompts:  # fmt: skip
    """Texts by their index as :func:`~pilotfish.conditioning.encoded` gives them, from a folder in
    which those that it lacks are encoded first. The text encoders are not needed after it.

    Args:
        device: where the text encoders run, and of the embeddings.
        offload: keep them in the memory of the CPU, but for the layer that runs.

    Raises:
        ConfigError: the folder's disk is too small, or a file in it cannot be read.
    """
    cache = EmbeddingsCache(folder, pipe, device, offload)
    roles: list[Role] = ["prompt"]
    if Backbone.of_pipeline(pipe).other_negatives:
        roles.append("negative")
    cache.add("null", [""])
    left = len(roles) * len(texts)
    with tqdm(total=left, desc="encode prompts", mininterval=1.0) as bar:
        for role in roles:
            for some in batches(texts):
                cache.add(role, some, left)
                bar.update(len(some))
                left -= len(some)
    log(f"embeddings are in {cache.folder}; {cache.added} texts were encoded")
    return encoded(pipe, texts, encode=cache)


class EmbeddingsCache:
    """Encodes texts, or reads them from the disk where they were encoded before.

    Args:
        folder: of all text encoders.
        pipe: the pipeline that encodes. Its text encoders are moved to ``device`` when they are
            first needed.
        device: see :func:`cached_prompts`, as of ``offload``.

    Attributes:
        folder: of these text encoders.
        added: how many texts were encoded.

    Raises:
        ConfigError: a file cannot be read.
    """

    def __init__(
        self, folder: str | Path, pipe: Any, device: torch.device, offload: bool = False
    ) -> None:  # fmt: skip
        self.folder = Path(folder) / encoders_sha256(pipe)[:16]
        self.pipe, self.device, self.offload, self.added = pipe, device, offload, 0
        self.places: dict[bytes, tuple[Path, int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            self._note(file, _rows(file))

    def __call__(self, role: Role, texts: Sequence[str]) -> TextConditions:
        """N texts, on the device."""
        self.add(role, texts)
        return TextConditions.cat([self._read(*self.places[_key(role, text)]) for text in texts])

    def add(self, role: Role, texts: Sequence[str], left: int = 0) -> None:
        """Encode the texts that are not there, in one batch.

        Args:
            left: how many more texts may follow, for which the disk must have room.

        Raises:
            ConfigError: it has none.
        """
        new = {_key(role, text): text for text in texts}
        new = {key: text for key, text in new.items() if key not in self.places}
        if new:
            if not self.added:
                self._place_encoders()
            made = encode_as(self.pipe, role, list(new.values()), self.device)
            self._check_room(made.nbytes // len(made) * max(left, len(made)))
            self._write(made, list(new))

    def _place_encoders(self) -> None:
        for encoder in text_encoders(self.pipe).values():
            if self.offload:
                apply_group_offloading(
                    encoder, onload_device=self.device, offload_type="leaf_level",
                    use_stream=self.device.type == "cuda",
                )  # fmt: skip
            else:
                encoder.to(self.device)

    def _check_room(self, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"the embeddings of the prompts may take {needed / 1e9:.1f} GB more in "
                f"{self.folder.parent}, whose disk has {free / 1e9:.1f} GB left: give fewer "
                "prompts, or another folder to --cache_embeddings"
            )

    def _write(self, made: TextConditions, keys: list[bytes]) -> None:
        tensors = {
            name: value.detach().cpu().contiguous()
            for name, value in vars(made).items()
            if value is not None
        }
        rows = [key.hex() for key in keys]
        name = sha256("".join(rows).encode()).hexdigest()[:32]
        file = self.folder / f"{name}.safetensors"
        aside = file.with_name(f".{name}.{os.getpid()}.part")
        try:
            save_file(tensors, aside, metadata={ROWS: json.dumps(rows)})
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
        self.added += len(keys)
        self._note(file, keys)

    def _note(self, file: Path, keys: Iterable[bytes]) -> None:
        for row, key in enumerate(keys):
            self.places.setdefault(key, (file, row))

    def _read(self, file: Path, row: int) -> TextConditions:
        opened = _open(file)
        found = {
            name: opened.get_slice(name)[row : row + 1].to(self.device) for name in opened.keys()  # noqa: SIM118
        }  # fmt: skip
        return TextConditions(**found)


def _key(role: Role, text: str) -> bytes:
    return sha256(f"{role}\n{text}".encode()).digest()


@lru_cache(maxsize=OPEN_FILES)
def _open(file: Path) -> Any:
    """A memory-mapped file."""
    try:
        return safe_open(str(file), "pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} cannot be read, delete it: {error}") from error


def _rows(file: Path) -> list[bytes]:
    """What each row of a file is."""
    return [bytes.fromhex(key) for key in json.loads(_open(file).metadata()[ROWS])]


# -- the text encoders ------------------------------------------------------------------------


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by the names of its components."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and isinstance(part, nn.Module)
    }


def free_text_encoders(pipe: Any) -> None:
    """Leave a pipeline without its text encoders, and give their memory back."""
    pipe.register_modules(**dict.fromkeys(text_encoders(pipe)))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encoders_sha256(pipe: Any) -> str:
    """SHA-256 of what embeddings depend on beside the text: text encoders, tokenizers, and how the
    pipeline calls them."""
    encoding = signature(pipe.encode_prompt).parameters.values()
    backbone = Backbone.of_pipeline(pipe)
    facts: dict[str, Any] = {
        "pipeline": type(pipe).__name__,
        "versions": {name: version(name) for name in ("diffusers", "transformers")},
        "defaults": [str(parameter) for parameter in encoding],
        "encoding": repr(backbone.encoding([])),
        "null": [repr(backbone.null_text), backbone.separate_negative],
        "config": {
            name: value for name, value in pipe.config.items() if name.startswith("force_zeros")
        },
    }
    encoders: dict[str, Any] = text_encoders(pipe)
    for name, part in encoders.items():
        config = part.config.to_dict()
        plain = {key: value for key, value in config.items() if key not in _PLACES}
        facts[name] = [type(part).__name__, json.dumps(plain, default=str), checksum(part)]
    for name, part in pipe.components.items():
        if isinstance(part, PreTrainedTokenizerBase):
            facts[name] = _tokenizer_facts(part)
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tokenizer_facts(tokenizer: Any) -> list[Any]:
    """How a tokenizer splits texts. How it last padded is no part of it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    state = {name: state[name] for name in state if name not in ("padding", "truncation")}
    digest = sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    own = (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.chat_template)
    return [type(tokenizer).__name__, digest, special, *own]
