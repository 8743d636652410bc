"""A guide practises on fine-tunes of its base, and the base comes out of it untouched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pilotfish.guides import Guide, TinyGuide
from pilotfish.pipelines.loading import PipelineError, fine_tuned_weights
from pilotfish.teacher import checksum
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.guidance_stage import GuidanceDistillation
from pilotfish.training.material import Material
from pilotfish.training.practice import STRENGTHS, PracticeHosts, mixtures


@pytest.fixture
def pipe(make_pipe: Callable[[str], Any]) -> Any:
    return make_pipe("epsilon")


@pytest.fixture
def tuned(pipe: Any, tmp_path: Path) -> Path:
    """A fine-tune of the pipeline's UNet, saved as a UNet."""
    pipe.unet.save_pretrained(tmp_path / "unet")
    other = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "tuned" / "unet")
    return tmp_path / "tuned"


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"]))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    unet.delete_adapters("default")


def test_the_weights_of_a_fine_tune_are_found_however_it_is_saved(pipe: Any, tuned: Path) -> None:
    by_pipeline = fine_tuned_weights(pipe.unet, tuned)
    by_unet = fine_tuned_weights(pipe.unet, tuned / "unet")
    names = pipe.unet.state_dict().keys()
    assert by_pipeline.keys() == by_unet.keys() == names
    assert all(torch.equal(by_pipeline[k], by_unet[k]) for k in names)
    assert not torch.equal(by_unet["conv_in.weight"], pipe.unet.conv_in.weight)


def test_a_lora_is_a_fine_tune_too(make_pipe: Callable[[str], Any], tmp_path: Path) -> None:
    save_lora(make_pipe("epsilon").unet, tmp_path / "lora")
    pipe = make_pipe("epsilon")
    plain = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    weights = fine_tuned_weights(pipe.unet, tmp_path / "lora")
    moved = {k for k, v in plain.items() if not torch.allclose(v, weights[k])}
    assert moved
    assert all("to_q" in k or "conv1" in k for k in moved)
    assert all(torch.equal(v, pipe.unet.state_dict()[k]) for k, v in plain.items())


def test_a_folder_without_a_fine_tune_is_refused(
    pipe: Any, make_pipe: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match="no fine-tune could be loaded"):
        fine_tuned_weights(pipe.unet, tmp_path)
    config = dict(pipe.unet.config) | {"cross_attention_dim": 24}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(PipelineError, match="no fine-tune of this base"):
        fine_tuned_weights(pipe.unet, tmp_path / "wider")


def test_the_base_comes_back_bit_for_bit(pipe: Any, tuned: Path) -> None:
    before, at_base = checksum(pipe.unet), pipe.unet.conv_in.weight.clone()
    weights = fine_tuned_weights(pipe.unet, tuned)
    hosts = PracticeHosts(pipe.unet, [weights], 0.5)
    for index, share in enumerate(STRENGTHS, 1):
        hosts.wear(index)
        worn = pipe.unet.conv_in.weight - at_base
        torch.testing.assert_close(worn, share * (weights["conv_in.weight"] - at_base))
    hosts.wear(0)
    assert checksum(pipe.unet) == before


def test_what_fine_tunes_changed_is_mixed() -> None:
    torch.manual_seed(0)
    denoiser = torch.nn.Linear(50, 50)
    base = {k: v.clone() for k, v in denoiser.state_dict().items()}
    changes = [{k: torch.randn_like(v) for k, v in base.items()} for _ in range(3)]
    tuned = [{k: base[k] + change[k] for k in base} for change in changes]
    hosts = PracticeHosts(denoiser, tuned, 0.5)
    assert len(hosts) == 1 + 3 * len(STRENGTHS) + 3 + 1
    for index, shares in enumerate(mixtures(3), 1):
        hosts.wear(index)
        mixed = sum(s * c["weight"] for s, c in zip(shares, changes, strict=True))
        torch.testing.assert_close(denoiser.weight - base["weight"], mixed)
        if 0.5 not in shares and 1.5 not in shares:  # as far from the base as a fine-tune is
            assert 45 < float((denoiser.weight - base["weight"]).norm()) < 55
    hosts.wear(0)
    assert torch.equal(denoiser.weight, base["weight"])


def test_every_host_has_its_share(pipe: Any, tuned: Path) -> None:
    hosts = PracticeHosts(pipe.unet, [fine_tuned_weights(pipe.unet, tuned)], 0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = [hosts.draw(generator) for _ in range(1000)]
    assert 450 < drawn.count(0) < 550
    assert all(120 < drawn.count(i) < 210 for i in range(1, 1 + len(STRENGTHS)))
    alone = PracticeHosts(pipe.unet, [], 0.5)
    assert {alone.draw(generator) for _ in range(20)} == {0}


def train(config: DistillConfig, pipe: Any) -> Guide:
    torch.manual_seed(0)
    material = Material(pipe, ["a cat", "cat", "dog", "a"], ["tca", "act"])
    guide = TinyGuide.for_denoiser(pipe.unet, "epsilon", rank=4, condition=4)
    return GuidanceDistillation(config, material, guide, notice=lambda line: None).run()


def test_latents_get_somewhere_on_every_host(pipe: Any, tuned: Path, tmp_path: Path) -> None:
    """A host whose turn comes seldom has few latents on their way: of as many as on the base
    none would leave the noise."""
    config = DistillConfig(
        output_dir=str(tmp_path), train_batch_size=4, pool=60, practice=(str(tuned),),
        report_to="none",
    )  # fmt: skip
    guide = TinyGuide.for_denoiser(pipe.unet, "epsilon", rank=4, condition=4)
    stage = GuidanceDistillation(config, Material(pipe, ["cat", "a"], ["act"]), guide)
    sizes = [len(stage.pool(0, host, (2, 4), 0.0).latents) for host in range(len(stage.practice))]
    assert sizes == [60, *[60 // len(STRENGTHS)] * len(STRENGTHS)]
    small = GuidanceDistillation(
        replace(config, train_batch_size=20), Material(pipe, ["cat", "a"], ["act"]), guide
    )
    assert len(small.pool(0, 1, (2, 4), 0.0).latents) == 40


def test_two_streams_practise_as_those_of_two_processes(
    pipe: Any, tuned: Path, tmp_path: Path
) -> None:
    """A stream's pools depend on its own share of the batch, not on who else is in the process."""

    def latents(**settings: Any) -> list[int]:
        config = DistillConfig(
            output_dir=str(tmp_path / "run"), practice=(str(tuned),), pool=32, report_to="none",
            **settings,
        )  # fmt: skip
        material = Material(pipe, ["cat", "dog"], ["cat"])
        guide = TinyGuide.for_denoiser(pipe.unet, "epsilon", rank=4, condition=4)
        run = GuidanceDistillation(config, material, guide, notice=lambda line: None)
        rings = run._streams(None).rings[0]
        return [len(ring.source.pool.latents) for ring in rings]  # type: ignore[attr-defined]

    alone = latents(train_batch_size=4)
    assert alone == latents(train_batch_size=8, streams=2)
    assert alone[1] < alone[0]
    assert alone != latents(train_batch_size=8)


def test_practice_resumes_exactly_and_teaches_something_else(
    make_pipe: Callable[[str], Any], tuned: Path, tmp_path: Path
) -> None:
    config = DistillConfig(
        output_dir=str(tmp_path / "run"), train_batch_size=4, max_train_steps=8, pool=8,
        replay_capacity=24, trajectory_steps_min=2, trajectory_steps_max=4,
        checkpointing_steps=4, checkpoints_total_limit=None, validation_steps=8,
        lr_warmup_steps=1, report_to="none", practice=(str(tuned),),
    )  # fmt: skip
    pipe = make_pipe("epsilon")
    before = checksum(pipe.unet)
    whole = train(config, pipe)
    assert checksum(pipe.unet) == before
    resume = str(tmp_path / "run" / "checkpoint-4")
    again = replace(config, output_dir=str(tmp_path / "again"), resume=resume)
    resumed = train(again, make_pipe("epsilon"))
    alone = train(
        replace(config, output_dir=str(tmp_path / "alone"), practice=()), make_pipe("epsilon")
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    assert any(
        not torch.equal(t, alone.state_dict()[name]) for name, t in whole.state_dict().items()
    )
    with pytest.raises(ConfigError, match="its practice is "):
        train(replace(again, practice=()), make_pipe("epsilon"))
