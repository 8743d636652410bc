"""Damaged guides and checkpoints: the same, or an error that names the place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pilotfish.guides.files import weight_files
from safetensors.torch import load_file, save_file

from pilotfish.checksums import ChecksumError, load_with_checksum, save_with_checksum
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError
from pilotfish.training.checkpoint import list_checkpoints
from pilotfish.training.config import DistillConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.stages import GuidanceTrainer
from tests.stress.runs.damage import altered, flipped, truncated
from tests.stress.runs.files import damaged_checkpoint, damaged_guide
from tests.stress.runs.result import EnduranceError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def quiet(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def folder(unet: Any, randomise: Any, tmp_path: Path) -> Path:
    guide = TinyGuide.for_denoiser(unet, "epsilon", rank=4, condition=4)
    randomise(guide).save_pretrained(tmp_path / "guide")
    return tmp_path / "guide"


def test_a_damaged_guide_is_the_same_or_refused(folder: Path) -> None:
    outcomes = damaged_guide(folder, 25, 0, quiet)
    assert outcomes["refused"] > 100
    assert outcomes["the same"] > 0  # in half precision, or cut off after the last brace


def test_without_a_checksum_a_flipped_bit_goes_unnoticed(folder: Path) -> None:
    """So that the trials can fail, and an old guide still loads."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    Guide.from_pretrained(folder)
    with pytest.raises(EnduranceError, match="one bit flipped, was loaded as something else"):
        damaged_guide(folder, 25, 0, quiet)


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
    """Its tensors lie in the file that is written."""
    guide = Guide.from_pretrained(folder)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    guide.save_pretrained(folder)
    again = Guide.from_pretrained(folder).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in before.items())


def test_pickles_are_not_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GuideError, match="safetensors only"):
        Guide.from_pretrained(folder).save_pretrained(tmp_path / "p", safe_serialization=False)


@pytest.mark.parametrize("beside", [None, {"a": [1, 2.5]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_a_checksum_covers_tensors_and_configuration(
    tmp_path: Path, beside: Any, dtype: torch.dtype
) -> None:
    path = tmp_path / "saved.safetensors"
    tensors = {
        "a": torch.ones(2, 3).to(dtype).T,
        "b": torch.tensor(1).to(dtype),
        "c": torch.ones(0),
    }
    save_with_checksum(tensors, path, beside)
    loaded = load_with_checksum(path, beside)
    assert all(torch.equal(v, loaded[k]) for k, v in tensors.items())
    with pytest.raises(ChecksumError, match=r"saved\.safetensors"):
        load_with_checksum(path, {"a": [1, 2]})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChecksumError, match="checksum mismatch"):
        load_with_checksum(path, beside)


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    """Thirty of them, as each would by chance."""
    files = [tmp_path / f"{i}.safetensors" for i in range(30)]
    for file in files:
        save_with_checksum({"b": torch.ones(2), "a": torch.zeros(1)}, file, None)
    assert len({file.read_bytes() for file in files}) == 1
    assert load_with_checksum(files[0], None).keys() == {"a", "b"}


def test_damage_is_damage(folder: Path) -> None:
    path = folder / WEIGHTS
    whole = path.read_bytes()
    cut = list(truncated(path))
    assert [len(d.content) for d in cut[:-1]] == list(range(0, len(whole), 1024))
    for damage in (*cut, *flipped(path, 20, 1), *altered(path)):
        assert damage.content != whole
    one = next(flipped(path, 1, 1)).content
    assert sum((a ^ b).bit_count() for a, b in zip(one, whole, strict=True)) == 1


def test_a_damaged_checkpoint_is_the_same_or_refused(pipe: Any, tmp_path: Path) -> None:
    config = DistillConfig(
        output=str(tmp_path / "run"), train_batch_size=4, max_train_steps=2, pool=4,
        replay_capacity=8, trajectory_steps_min=2, trajectory_steps_max=4, checkpointing_steps=1,
        validation_steps=2, lr_warmup_steps=1, report_to="none",
    )  # fmt: skip

    def begun() -> GuidanceTrainer:
        torch.manual_seed(0)
        guide = TinyGuide.for_denoiser(
            pipe.unet, "epsilon", push=False, rank=0, head=4, condition=4
        )
        context = TrainingContext(pipe, ["cat", "dog"], ["a"])
        how = replace(config, resume="latest")
        return GuidanceTrainer(how, context, guide, notice=lambda line: None)

    begun().run()
    path = list_checkpoints(tmp_path / "run")[-1]
    outcomes = damaged_checkpoint(begun(), path, 25, 0, quiet)
    assert outcomes["refused"] > 100
