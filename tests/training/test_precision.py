"""A frozen base in half precision, and Adam in eight bits: less memory, the guide in float32."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import baselines  # noqa: F401
from pilotfish.guides import Guide
from pilotfish.teacher import checkpoint_in_pass
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.stages import new_guide
from tests.training.runs import same, train, train_steps

Context = Callable[..., TrainingContext]


def resumed(config: Any, tmp_path: Path) -> Any:
    checkpoint = str(Path(config.output) / "checkpoint-2")
    return replace(config, output=str(tmp_path / "again"), resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("changes", [{"mixed_precision": "bf16"}, {"base_dtype": "bf16"}])
def test_half_precision_resumes_and_leaves_the_guide_in_float32(
    config: DistillConfig, context: Context, changes: Any, tmp_path: Path
) -> None:
    # with a validation before the checkpoint, at the precision of the base
    config = replace(config, training_samples="on_policy", validation_steps=2, **changes)
    given = context("v_prediction")
    whole = train(config, given)
    half = torch.bfloat16 if "base_dtype" in changes else torch.float32
    for network in (given.pipe.unet, given.pipe.text_encoder):
        assert {p.dtype for p in network.parameters()} == {half}
    assert given.pipe.vae.dtype == whole.dtype == torch.float32
    assert same(whole, train(resumed(config, tmp_path), context("v_prediction")))
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = replace(config, base_dtype="fp32", mixed_precision="no", output=str(tmp_path / "plain"))
    other = train(plain, context("v_prediction"))
    assert not same(whole, other)
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.2, atol=0.02)


def test_steps_are_distilled_on_a_base_in_half(
    steps_config: StepsConfig, context: Context, tmp_path: Path
) -> None:
    config = replace(steps_config, base_dtype="bf16")
    whole = train_steps(config, context())
    assert whole.dtype == torch.float32
    assert same(whole, train_steps(resumed(config, tmp_path), context()))


@pytest.mark.parametrize("kind", Guide.registry)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_guide_has_gradients_in_float32(
    kind: str, checkpointing: bool, config: DistillConfig, context: Context,
    randomise: Callable[[Guide], Guide],
) -> None:  # fmt: skip
    config = replace(config, guide_type=kind, guide=None)
    given = context()
    guide = randomise(new_guide(config, given))
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, *given.latent_shape, generator=draw), torch.tensor([0.9, 0.1])
    predictions = []
    for dtype in (torch.float32, torch.bfloat16):
        given.cast(dtype)
        vars(given).pop("texts", None)
        if checkpointing:
            given.pipe.unet.enable_gradient_checkpointing(checkpoint_in_pass)
        given.pipe.unet.requires_grad_(False)
        student, texts = given.student(guide), given.texts
        made = student(z, t, texts(torch.tensor([0, 3])), texts.null, torch.tensor([4.0, 4.0]))
        assert made.dtype == dtype
        predictions.append(made.detach().float())
        guide.zero_grad()
        made.float().pow(2).mean().backward()  # with checkpointing, a second forward pass
        student.hooks.remove()
        gradients = [p.grad for p in guide.parameters() if p.grad is not None]
        assert {g.dtype for g in gradients} == {torch.float32}
        assert all(torch.isfinite(g).all() for g in gradients)
        # finer than half precision
        assert any(not torch.equal(g, g.bfloat16().float()) for g in gradients)
    torch.testing.assert_close(*predictions, rtol=0.1, atol=0.1)


def test_eight_bits_without_bitsandbytes_are_refused(
    config: DistillConfig, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"pip install 'pilotfish\[8bit\]'"):
        train(replace(config, use_8bit_adam=True), context())


@pytest.mark.slow
def test_eight_bits_resume(config: DistillConfig, context: Context, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = replace(config, guide_type="full", guide=None, use_8bit_adam=True)
    whole = train(config, context())
    assert same(whole, train(resumed(config, tmp_path), context()))
    plain = replace(config, use_8bit_adam=False, output=str(tmp_path / "plain"))
    assert not same(whole, train(plain, context()))
