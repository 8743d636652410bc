"""A frozen base in half precision, and Adam in eight bits: less memory, nothing lost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.guides import Guide, TinyGuide
from pilotfish.teacher import checkpoint_in_pass
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig, TrainingConfig
from pilotfish.training.guidance_stage import GuidanceDistillation
from pilotfish.training.kinds import KINDS, new_guide
from pilotfish.training.material import Material
from pilotfish.training.step_stage import StepDistillation

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]
SHORT: dict[str, Any] = {
    "train_batch_size": 4, "max_train_steps": 4, "pool": 8, "replay_capacity": 8,
    "checkpointing_steps": 2, "checkpoints_total_limit": None, "validation_steps": 2,
    "lr_warmup_steps": 1, "report_to": "none", "base_dtype": "bf16",
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return DistillConfig(output_dir=str(tmp_path / "run"), states="student", rank=4,
                         trajectory_steps_min=2, trajectory_steps_max=4, **SHORT)  # fmt: skip


@pytest.fixture
def material(make_pipe: Callable[[str], Any]) -> Callable[[], Material]:
    return lambda: Material(make_pipe("epsilon"), PROMPTS, ["tca", "act"])


def train(config: DistillConfig, material: Material) -> Guide:
    guide = new_guide(config, material)
    return GuidanceDistillation(config, material, guide, notice=lambda line: None).run()


def train_steps(config: StepsConfig, material: Material) -> Guide:
    torch.manual_seed(0)
    teacher = TinyGuide.for_denoiser(material.pipe.unet, "epsilon", rank=4)
    return StepDistillation(config, material, teacher, 2, notice=lambda line: None).run()


def same(one: Guide, two: Guide) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def resumed(config: TrainingConfig, tmp_path: Path) -> Any:
    checkpoint = str(Path(config.output_dir) / "checkpoint-2")
    return replace(config, output_dir=str(tmp_path / "again"), resume=checkpoint)


@pytest.mark.slow
def test_the_base_is_held_in_half_and_the_guide_is_not(
    config: DistillConfig, material: Callable[[], Material], tmp_path: Path
) -> None:
    given = material()
    whole = train(config, given)
    for network in (given.pipe.unet, given.pipe.text_encoder):
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert given.pipe.vae.dtype == whole.dtype == torch.float32
    # in between it was validated, in pictures, at the precision of the base
    assert same(whole, train(resumed(config, tmp_path), material()))
    plain = replace(config, base_dtype="fp32", output_dir=str(tmp_path / "plain"))
    other = train(plain, material())
    assert not same(whole, other)
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.2, atol=0.02)


@pytest.mark.slow
def test_steps_are_distilled_on_a_base_in_half(
    material: Callable[[], Material], tmp_path: Path
) -> None:
    config = StepsConfig(output_dir=str(tmp_path / "run"), steps=(2,), **SHORT)
    whole = train_steps(config, material())
    assert whole.dtype == torch.float32
    assert same(whole, train_steps(resumed(config, tmp_path), material()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_guide_learns_in_whole_precision(
    kind: Any, checkpointing: bool, config: DistillConfig, material: Callable[[], Material],
    randomise: Callable[[Guide], Guide],
) -> None:  # fmt: skip
    if kind in ("dice", "cfg-lora"):
        config = replace(config, guidance_scale_min=4.0, guidance_scale_max=4.0, guide=kind)
    given = material()
    guide = randomise(new_guide(replace(config, guide=kind), given))
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, *given.latent_shape, generator=draw), torch.tensor([900, 100])
    predictions = []
    for dtype in (torch.float32, torch.bfloat16):
        given.hold_in(dtype)
        vars(given).pop("texts", None)
        if checkpointing:
            given.pipe.unet.enable_gradient_checkpointing(checkpoint_in_pass)
        given.pipe.unet.requires_grad_(False)
        student, texts = given.student(guide), given.texts
        made = student(z, t, texts(torch.tensor([0, 3])), texts.null, torch.tensor([4.0, 4.0]))
        assert made.dtype == dtype
        predictions.append(made.detach().float())
        guide.zero_grad()
        made.float().pow(2).mean().backward()  # with checkpoints, once more through the hooks
        student.hooks.remove()
        gradients = [p.grad for p in guide.parameters() if p.grad is not None]
        assert {g.dtype for g in gradients} == {torch.float32}
        assert all(torch.isfinite(g).all() for g in gradients)
        # finer than half precision could tell
        assert any(not torch.equal(g, g.bfloat16().float()) for g in gradients)
    torch.testing.assert_close(*predictions, rtol=0.1, atol=0.1)


def test_half_of_float16_needs_its_gradients_scaled(config: DistillConfig) -> None:
    with pytest.raises(ConfigError, match=r"base_dtype must be .* without --mixed_precision fp16"):
        replace(config, base_dtype="fp16")
    replace(config, base_dtype="fp16", mixed_precision="fp16")


def test_what_eight_bits_need_is_named(
    config: DistillConfig, material: Callable[[], Material], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'pilotfish\[8bit\]'"):
        train(replace(config, use_8bit_adam=True), material())


@pytest.mark.slow
def test_eight_bits_resume(
    config: DistillConfig, material: Callable[[], Material], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    config = replace(config, guide="full", use_8bit_adam=True, base_dtype="fp32")
    whole = train(config, material())
    assert same(whole, train(resumed(config, tmp_path), material()))
    plain = replace(config, use_8bit_adam=False, output_dir=str(tmp_path / "plain"))
    assert not same(whole, train(plain, material()))
