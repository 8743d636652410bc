"""Fine-tune augmentation: the guide is trained on fine-tunes, and the base stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from pilotfish.pipelines.loading import PipelineError, fine_tuned_weights
from pilotfish.teacher import checksum
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.finetunes import STRENGTHS, FineTunes, mixtures
from pilotfish.training.stages import GuidanceTrainer
from tests.training.runs import same, small_guide, train

Context = Callable[..., TrainingContext]


@pytest.fixture
def tuned(pipe: Any, tmp_path: Path) -> Path:
    """A fine-tune of the pipeline's UNet."""
    pipe.unet.save_pretrained(tmp_path / "unet")
    other = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "tuned" / "unet")
    return tmp_path / "tuned"


def test_a_folder_without_a_fine_tune_is_refused(context: Context, tmp_path: Path) -> None:
    given = context()
    with pytest.raises(PipelineError, match="no fine-tune could be loaded"):
        given.fine_tunes([str(tmp_path)])
    config = dict(given.pipe.unet.config) | {"cross_attention_dim": 24}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(PipelineError, match="no fine-tune of this base"):
        given.fine_tunes([str(tmp_path / "wider")])


def test_the_base_comes_back_bit_for_bit(pipe: Any, tuned: Path) -> None:
    before, at_base = checksum(pipe.unet), pipe.unet.conv_in.weight.clone()
    weights = fine_tuned_weights(pipe.unet, tuned)
    finetunes = FineTunes(pipe.unet, [weights], 0.5)
    for index, strength in enumerate(STRENGTHS, 1):
        finetunes.activate(index)
        change = pipe.unet.conv_in.weight - at_base
        torch.testing.assert_close(change, strength * (weights["conv_in.weight"] - at_base))
    finetunes.activate(0)
    assert checksum(pipe.unet) == before


class Counted(Mapping[str, torch.Tensor]):
    """Weights that count how often one is read."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.weights, self.reads = weights, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.reads += 1
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def test_changes_are_mixed_and_a_share_of_zero_is_not_computed() -> None:
    torch.manual_seed(0)
    denoiser = torch.nn.Linear(50, 50)
    base = {k: v.clone() for k, v in denoiser.state_dict().items()}
    changes = [{k: torch.randn_like(v) for k, v in base.items()} for _ in range(3)]
    tuned = [{k: base[k] + change[k] for k in base} for change in changes]
    finetunes = FineTunes(denoiser, tuned, 0.5)
    finetunes.weights = counted = [Counted(weights) for weights in finetunes.weights]
    assert len(finetunes) == 1 + 3 * len(STRENGTHS) + 3 + 1
    for index, shares in enumerate(mixtures(3), 1):
        for weights in counted:
            weights.reads = 0
        finetunes.activate(index)
        assert [w.reads for w in counted] == [len(base) if share else 0 for share in shares]
        change = (denoiser.weight - base["weight"]).detach()
        mixed = sum(s * c["weight"] for s, c in zip(shares, changes, strict=True))
        torch.testing.assert_close(change, mixed)
        if not {0.5, 1.5, 2.5} & set(shares):  # as far from the base as a fine-tune
            assert 45 < float(change.norm()) < 55
    finetunes.activate(0)
    assert torch.equal(denoiser.weight, base["weight"])


def test_models_are_drawn_with_their_probability(pipe: Any) -> None:
    finetunes = FineTunes(pipe.unet, [pipe.unet.state_dict()], 0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = [finetunes.draw(generator) for _ in range(1000)]
    assert 450 < drawn.count(0) < 550
    assert all(90 < drawn.count(i) < 160 for i in range(1, 1 + len(STRENGTHS)))
    alone = FineTunes(pipe.unet, [], 0.5)
    assert {alone.draw(generator) for _ in range(20)} == {0}


def test_a_model_that_is_drawn_seldom_has_a_small_pool(
    config: DistillConfig, context: Context, tuned: Path
) -> None:
    """It depends on the batch of a stream, not on the other streams of the process."""

    def sizes(**settings: Any) -> list[int]:
        given = context()
        settings = {"train_finetunes": (str(tuned),), "pool": 60, **settings}
        trainer = GuidanceTrainer(replace(config, **settings), given, small_guide(given.pipe.unet))
        rings = trainer.make_streams(None).rings[0]
        return [len(ring.source.pool.latents) for ring in rings]  # type: ignore[attr-defined]

    alone = sizes(train_batch_size=4)
    assert alone == [60, *[60 // len(STRENGTHS)] * len(STRENGTHS)]
    assert alone == sizes(train_batch_size=8, streams=2)
    assert sizes(train_batch_size=20)[1] == 40


def test_augmentation_resumes_exactly_and_gives_another_guide(
    config: DistillConfig, context: Context, tuned: Path, tmp_path: Path
) -> None:
    config = replace(config, train_finetunes=(str(tuned),), replay_capacity=24)
    whole = train(config, given := context())
    assert checksum(given.denoiser) == checksum(context().denoiser)
    resume = str(tmp_path / "run" / "checkpoint-2")
    again = replace(config, output=str(tmp_path / "again"), resume_from_checkpoint=resume)
    assert same(whole, train(again, context()))
    alone = replace(config, output=str(tmp_path / "alone"), train_finetunes=())
    assert not same(whole, train(alone, context()))
    with pytest.raises(
        ConfigError, match=r"train_finetunes is \[.*tuned'\] in the checkpoint, \[\]"
    ):
        train(replace(again, train_finetunes=()), context())
