"""Embeddings of prompts are computed once, whatever runs after."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish import conditioning
from pilotfish.conditioning import NULL, encoded
from pilotfish.interface import TextConditions
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.embeddings import cached_prompts, encoders_sha256, text_encoders
from pilotfish.training.stages import distill
from tests.pipelines.pipelines import build
from tests.training.runs import WEIGHTS, same, train, train_steps

Context = Callable[..., TrainingContext]
CPU = torch.device("cpu")
TEXTS = ["cat", "a red cat", "dog", "cat"]


@contextmanager
def encoded_texts(pipe: Any) -> Iterator[list[int]]:
    """The batch size of every call of the first text encoder."""
    sizes: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(args[0] if args else kwargs["input_ids"]))

    handle = pipe.text_encoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def assert_same(one: TextConditions, two: TextConditions, padded_alike: bool) -> None:
    """The same texts; what counts of them where they are padded to another length."""
    if one.embeds.shape != two.embeds.shape:
        assert not padded_alike
        torch.testing.assert_close(one.mean(), two.mean())
        return
    for name, mine in vars(one).items():
        assert (mine is None) == (vars(two)[name] is None)
        if mine is not None:
            torch.testing.assert_close(mine, vars(two)[name])


def test_a_training_is_the_same_and_the_second_start_encodes_nothing(
    config: DistillConfig, steps_config: StepsConfig, context: Context, tmp_path: Path
) -> None:
    config = replace(config, negative_prompt_prob=0.5)
    plain, folder, made = train(config, context()), str(tmp_path / "embeddings"), []
    for run, calls in (("first", [1, 1, 8]), ("second", [])):
        given = context()
        with encoded_texts(given.pipe) as sizes:
            given.cache_embeddings(folder, CPU)
        assert sizes == calls
        assert given.pipe.text_encoder is None
        made.append(train(replace(config, output=str(tmp_path / run)), given))
        assert (tmp_path / run / "validation" / "step-4.png").is_file()
    assert all(same(guide, plain) for guide in made)
    given = context()
    given.cache_embeddings(folder, CPU)
    halved = [
        train_steps(replace(steps_config, output=str(tmp_path / f"steps-{i}")), one, plain)
        for i, one in enumerate((given, context()))
    ]
    assert same(*halved)


def test_the_setting(saved_base: DistillConfig, tmp_path: Path) -> None:
    distill(saved_base)
    folder = tmp_path / "embeddings"
    distill(replace(saved_base, output=str(tmp_path / "run-2"), cache_embeddings=str(folder)))
    files = list(folder.glob("*/*.safetensors"))
    assert files
    one, two = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("run", "run-2"))
    assert one == two


def test_a_bundled_base_is_named_as_a_folder_is(config: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("owl\ncat\n")
    own = replace(
        config, pretrained_model_name_or_path="sd3", prompts=str(tmp_path / "prompts.txt"),
        validation_prompts=None, cache_embeddings=str(tmp_path / "kept"),
    )  # fmt: skip
    made = TrainingContext.from_config(own)
    assert text_encoders(made.pipe) == {}
    assert made.texts(torch.tensor([0, 1])).embeds.shape == (2, 17, 192)


@pytest.mark.parametrize(
    "name",
    ["SD", "SDXL", "SD3", "Sana", "Lumina2", "Qwen-Image", "Z-Image", "CogView4", "Wan", "LTX"],
)
def test_every_family_reads_what_it_would_encode(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build(name).pipe
    expected = encoded(pipe, TEXTS)
    index = torch.tensor([3, NULL, 0, 1])
    for cache_bytes in (2**29, 0):  # in memory, and from the disk in every step
        monkeypatch.setattr(conditioning.encoded, "__defaults__", (cache_bytes, None))
        found = cached_prompts(pipe, TEXTS, tmp_path, CPU)
        for one, two in (
            (found.null, expected.null), (found(index), expected(index)),
            (found.negative(index), expected.negative(index)),
        ):  # fmt: skip
            assert_same(one, two, padded_alike=cache_bytes > 0)


def test_a_text_is_encoded_once(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an interruption, in another list of prompts, and if it is there twice."""
    monkeypatch.setattr(conditioning, "BATCH", 2)

    def stopped(module: Any, args: Any, kwargs: Any) -> None:
        if len(sizes) == 4:
            raise KeyboardInterrupt

    texts = ["cat", "dog", "a cat", "dog", "red cat"]
    with encoded_texts(pipe) as sizes:
        handle = pipe.text_encoder.register_forward_pre_hook(stopped, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt):
            cached_prompts(pipe, texts, tmp_path, CPU)
        handle.remove()
        assert sizes == [1, 1, 2, 1]
        cached_prompts(pipe, [*texts, "tac"], tmp_path, CPU)
        assert sizes[4:] == [1, 2]
        cached_prompts(pipe, texts[::-1], tmp_path, CPU)
        assert len(sizes) == 6
    assert not list(tmp_path.rglob("*.part"))


def test_offloaded_text_encoders_encode_the_same(
    make_pipe: Callable[[str], Any], config: DistillConfig, tmp_path: Path
) -> None:
    one = cached_prompts(make_pipe("epsilon"), TEXTS, tmp_path / "one", CPU)
    two = cached_prompts(make_pipe("epsilon"), TEXTS, tmp_path / "two", CPU, offload=True)
    index = torch.tensor([0, 1, NULL])
    assert torch.equal(one(index).embeds, two(index).embeds)
    with pytest.raises(ConfigError, match="offload_text_encoders has no effect without --cache_em"):
        replace(config, offload_text_encoders=True)


def test_other_text_encoders_have_other_embeddings(
    make_pipe: Callable[[str], Any], pipe: Any, tmp_path: Path
) -> None:
    other = make_pipe("epsilon")
    assert encoders_sha256(other) == encoders_sha256(pipe)
    pipe.tokenizer("cat", padding="max_length", max_length=8)  # leaves its padding behind
    assert encoders_sha256(other) == encoders_sha256(pipe)
    next(iter(text_encoders(other).values())).to(torch.bfloat16)
    assert encoders_sha256(other) != encoders_sha256(pipe)
    for one in (pipe, other):
        cached_prompts(one, TEXTS, tmp_path, CPU)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_without_room_and_a_damaged_file_are_named(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        full = shutil.disk_usage(tmp_path)._replace(free=10_000)
        patched.setattr(shutil, "disk_usage", lambda path: full)
        with pytest.raises(
            ConfigError, match=r"may take 0\.0 GB more in .*: give fewer prompts, or"
        ):
            cached_prompts(pipe, TEXTS * 1000, tmp_path, CPU)
    cached_prompts(pipe, TEXTS, tmp_path / "damaged", CPU)
    file = next((tmp_path / "damaged").rglob("*.safetensors"))
    moved = tmp_path / "moved" / file.parent.name / file.name
    moved.parent.mkdir(parents=True)
    moved.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be read, delete it: "):
        cached_prompts(pipe, TEXTS, tmp_path / "moved", CPU)
