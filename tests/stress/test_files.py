"""Damaged guides and checkpoints: they load as they were saved, or an error names the file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file

from pilotfish import bundled
from pilotfish.checksums import ChecksumError, load_with_checksum, save_with_checksum
from pilotfish.guides import Guide, TinyGuide
from pilotfish.guides.saving import weight_files
from pilotfish.interface import GuideError
from pilotfish.training.checkpoint import CheckpointError, list_checkpoints
from pilotfish.training.config import DistillConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.stages import GuidanceTrainer
from tests.stress.page import LONG

WEIGHTS = "diffusion_pytorch_model.safetensors"
KIB = 1024
DTYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip
SAME, REFUSED = "same", "refused"
Record = Callable[[str, dict[str, float]], None]


class Damage(NamedTuple):
    """A damaged file: which, how, and its bytes."""

    path: Path
    kind: str
    content: bytes


def truncated(path: Path, every: int) -> Iterator[Damage]:
    """Cut off at every so many bytes, and just before the end."""
    whole = path.read_bytes()
    for end in (*range(0, len(whole), every), len(whole) - 1):
        yield Damage(path, "truncated", whole[:end])


def flipped(path: Path, number: int) -> Iterator[Damage]:
    """Single bits flipped, half of them in the first KiB, where names and shapes are."""
    whole, numbers = path.read_bytes(), random.Random(0)
    for i in range(number):
        content = bytearray(whole)
        place = numbers.randrange(min(KIB, len(whole)) if i % 2 else len(whole))
        content[place] ^= 1 << numbers.randrange(8)
        yield Damage(path, "bit flipped", bytes(content))


def altered(path: Path) -> Iterator[Damage]:
    """Intact safetensors files with wrong contents: each tensor in turn missing, of another shape
    and of another type; one tensor too many; none at all."""
    tensors = load(path.read_bytes())

    def written(kind: str, other: dict[str, torch.Tensor]) -> Damage:
        return Damage(path, kind, save(other, {"format": "pt"}))

    for i, (name, value) in enumerate(sorted(tensors.items())):
        rest = {k: v for k, v in tensors.items() if k != name}
        yield written("tensor missing", rest)
        shapes = (value[None].clone(), value.flatten()[: value.numel() // 2].clone())
        yield written("another shape", rest | {name: shapes[i % 2]})
        yield written("another type", rest | {name: value.to(DTYPES[i % len(DTYPES)])})
    yield written("tensor too many", tensors | {"stranger": torch.zeros(2)})
    yield written("no tensor", {})


def damages(folder: Path) -> Iterator[Damage]:
    """Every damage to every file of a folder."""
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        yield from truncated(path, KIB if LONG else 8 * KIB)
        yield from flipped(path, 200 if LONG else 12)
        if path.suffix == ".safetensors":
            yield from altered(path)


def after_each(
    folder: Path, loads_the_same: Callable[[Damage], bool], refusal: type[Exception]
) -> Counter[str]:
    """Load after each damage to a folder; how often each outcome came."""
    outcomes: Counter[str] = Counter()
    for damage in list(damages(folder)):
        before, what = damage.path.read_bytes(), f"{damage.path.name}, {damage.kind}"
        damage.path.write_bytes(damage.content)
        try:
            outcomes[SAME if loads_the_same(damage) else f"{what}, loads as something else"] += 1
        except refusal as error:
            outcomes[REFUSED if str(folder) in str(error) else f"{what}: {error}"] += 1
        finally:
            damage.path.write_bytes(before)
    assert set(outcomes) <= {SAME, REFUSED}, outcomes
    return outcomes


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """The same names, and the same values to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def damaged_guide(folder: Path) -> Counter[str]:
    """Load a saved guide after each damage to it."""

    def config(guide: Guide) -> dict[str, Any]:
        return {k: v for k, v in guide.config.items() if not k.startswith("_")}

    saved = Guide.from_pretrained(folder)
    whole = saved.state_dict()

    def loads_the_same(damage: Damage) -> bool:
        guide, expected = Guide.from_pretrained(folder), whole
        if damage.kind == "another type":  # in half precision it is still a guide
            expected = {k: v.to(whole[k].dtype) for k, v in load_file(damage.path).items()}
        return equal(guide.state_dict(), expected) and config(guide) == config(saved)

    return after_each(folder, loads_the_same, GuideError)


@pytest.fixture
def folder(unet: Any, randomise: Any, tmp_path: Path) -> Path:
    """A saved guide."""
    guide = bundled.load_guide() if LONG else TinyGuide.for_denoiser(unet, "epsilon", rank=4)
    (guide if LONG else randomise(guide)).save_pretrained(tmp_path / "guide")
    return tmp_path / "guide"


def test_a_damaged_guide_loads_as_it_was_or_is_refused(folder: Path, record: Record) -> None:
    found = damaged_guide(folder)
    assert found[REFUSED] > 50
    record("a guide's files", dict(found))


@pytest.mark.skipif(LONG, reason="checks the check")
def test_without_a_checksum_a_flipped_bit_is_not_noticed(folder: Path) -> None:
    """An old guide, without one, still loads."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    Guide.from_pretrained(folder)
    with pytest.raises(AssertionError, match="bit flipped, loads as something else"):
        damaged_guide(folder)


def test_a_configuration_that_is_not_that_of_the_weights_is_refused(
    folder: Path, edit_config: Any
) -> None:
    edit_config(folder, guidance_scale_range=[1.0, 9.0])
    with pytest.raises(GuideError, match="checksum mismatch"):
        Guide.from_pretrained(folder)


def test_every_part_of_a_large_guide_has_a_checksum(folder: Path, tmp_path: Path) -> None:
    guide = Guide.from_pretrained(folder)
    guide.save_pretrained(tmp_path / "large", max_shard_size="4KB")
    parts = weight_files(tmp_path / "large", None)
    assert len(parts) > 2
    Guide.from_pretrained(tmp_path / "large")
    content = bytearray(parts[1].read_bytes())
    content[-1] ^= 1
    parts[1].write_bytes(content)
    with pytest.raises(GuideError, match=parts[1].name):
        Guide.from_pretrained(tmp_path / "large")


def test_a_guide_from_the_hub_is_checked_as_well(folder: Path, tmp_path: Path) -> None:
    commit = "1" * 40
    place = tmp_path / "cache" / "models--me--guide"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    Guide.from_pretrained(folder).save_pretrained(place / "snapshots" / commit)
    Guide.from_pretrained("me/guide", cache_dir=tmp_path / "cache")
    path = place / "snapshots" / commit / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(GuideError, match="checksum mismatch"):
        Guide.from_pretrained("me/guide", cache_dir=tmp_path / "cache")


def test_a_guide_saved_where_it_was_loaded_from_is_whole(folder: Path) -> None:
    """Its tensors are mapped from the file that is written."""
    guide = Guide.from_pretrained(folder)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    guide.save_pretrained(folder)
    again = Guide.from_pretrained(folder).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in before.items())


def test_pickles_are_not_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GuideError, match="safetensors only"):
        Guide.from_pretrained(folder).save_pretrained(tmp_path / "p", safe_serialization=False)


@pytest.mark.parametrize("config", [None, {"a": [1, 2.5]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_a_checksum_covers_tensors_and_configuration(
    tmp_path: Path, config: Any, dtype: torch.dtype
) -> None:
    path = tmp_path / "saved.safetensors"
    tensors = {
        "a": torch.ones(2, 3).to(dtype).T,
        "b": torch.tensor(1).to(dtype),
        "c": torch.ones(0),
    }
    save_with_checksum(tensors, path, config)
    loaded = load_with_checksum(path, config)
    assert all(torch.equal(v, loaded[k]) for k, v in tensors.items())
    with pytest.raises(ChecksumError, match=r"saved\.safetensors"):
        load_with_checksum(path, {"a": [1, 2]})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match="checksum mismatch"):
        load_with_checksum(path, config)


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    """Thirty of them, since two may agree by chance."""
    files = [tmp_path / f"{i}.safetensors" for i in range(30)]
    for file in files:
        save_with_checksum({"b": torch.ones(2), "a": torch.zeros(1)}, file, None)
    assert len({file.read_bytes() for file in files}) == 1
    assert load_with_checksum(files[0], None).keys() == {"a", "b"}


@pytest.mark.skipif(LONG, reason="checks the check")
def test_damage_is_damage(folder: Path) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for damage in (*truncated(path, KIB), *flipped(path, 20), *altered(path)):
        assert damage.content != whole
    one = next(flipped(path, 1)).content
    assert sum((a ^ b).bit_count() for a, b in zip(one, whole, strict=True)) == 1


def test_a_damaged_checkpoint_loads_as_it_was_or_is_refused(
    model: Any, tmp_path: Path, record: Record
) -> None:
    config = DistillConfig(
        output=str(tmp_path / "run"), train_batch_size=4, max_train_steps=2, pool=4,
        replay_capacity=8, trajectory_steps_min=2, trajectory_steps_max=4, checkpointing_steps=1,
        validation_steps=2, lr_warmup_steps=1, report_to="none",
    )  # fmt: skip

    def trainer() -> GuidanceTrainer:
        torch.manual_seed(0)
        guide = TinyGuide.for_denoiser(model.unet, "epsilon", rank=0, head=4)
        context = TrainingContext(model, ["cat", "dog"], ["a"])
        resuming = replace(config, resume_from_checkpoint="latest")
        return GuidanceTrainer(resuming, context, guide, log=lambda line: None)

    trainer().run()
    run, path = trainer(), list_checkpoints(tmp_path / "run")[-1]
    streams = run.make_streams(path)

    def state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = run.state.tensors()
        for number, kept in streams.tensors().items():
            tensors |= {f"stream.{number}.{k}": v for k, v in kept.items()}
        copies = {k: v.detach().clone() for k, v in tensors.items()}
        return copies, run.progress.facts() | run.state.facts() | {"step": run.progress.step}

    run.checkpoints.load(path, streams)
    whole, facts = state()

    def loads_the_same(damage: Damage) -> bool:
        run.checkpoints.load(path, streams)
        tensors, found = state()
        return equal(tensors, whole) and found == facts

    found = after_each(path, loads_the_same, CheckpointError)
    assert found[REFUSED] > 50
    record("a checkpoint's files", dict(found))
