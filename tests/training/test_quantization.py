"""A frozen base in fewer bits trains a guide that fits the plain base, and the other way round."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.guidance_error import Trajectories, guidance_error
from pilotfish.guides import Guide
from pilotfish.pipelines.sampling import sample
from pilotfish.teacher import checksum, plain_tensors
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.quantization import PACKAGES
from tests.pipelines.pipelines import build
from tests.training.runs import PROMPTS, VALIDATION, same, train

KINDS = ("fp8", "int8", "nf4", "int8-torchao")
PRECISION: dict[str, Any] = {"SD": "bf16", "SD3": "no"}
"""Of the training, by family."""


def context(family: str) -> TrainingContext:
    return TrainingContext(build(family, alone=True).pipe, PROMPTS, VALIDATION)


def stored(module: torch.nn.Module) -> int:
    return sum(t.nbytes for x in module.parameters() for t in plain_tensors(x))


@pytest.mark.parametrize("family", PRECISION)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_resumes_and_fits_the_plain_base(
    kind: Any, family: str, config: DistillConfig, tmp_path: Path
) -> None:
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind][0])
    config = replace(
        config, base_quantization=kind, gradient_checkpointing=True, max_train_steps=3,
        mixed_precision=PRECISION[family],
    )  # fmt: skip
    given = context(family)
    plain, size = checksum(given.denoiser), stored(given.denoiser)
    whole = train(config, given)
    assert stored(given.denoiser) < 0.8 * size
    latest = Path(config.output) / "checkpoint-2"
    assert json.loads((latest / "state.json").read_text())["base_sha256"] == plain
    again = replace(config, output=str(tmp_path / "again"), resume_from_checkpoint=str(latest))
    assert same(whole, train(again, context(family)))
    words = f"base_quantization is {kind} in the checkpoint, no in the configuration"
    with pytest.raises(ConfigError, match=words):
        train(
            replace(again, base_quantization="no", resume_from_checkpoint="latest"), context(family)
        )
    # the plain base has the same sites, and is guided by it
    saved = Guide.from_pretrained(Path(config.output) / "guide")
    other = context(family)
    images = sample(
        other.pipe, ["cat"], seeds=[0], guidance_scale=4.0, num_inference_steps=2, guide=saved
    )
    assert all(torch.isfinite(one.image).all() for one in images)
    errors = [
        guidance_error(one.student(saved), Trajectories(
            one.teacher(), one.path, torch.tensor([0]), torch.tensor([-1]),
            torch.randn(1, *one.latent_shape, generator=torch.Generator().manual_seed(0)),
            num_inference_steps=2)).mean
        for one in (given, other)
    ]  # fmt: skip
    assert errors[0] == pytest.approx(errors[1], rel=0.2)


@pytest.mark.parametrize("kind", sorted(PACKAGES))
def test_a_missing_package_is_named(
    kind: Any, config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bitsandbytes", "bitsandbytes.nn", "torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    words = f"--base_quantization {kind} needs {PACKAGES[kind][0]}: pip install "
    with pytest.raises(ConfigError, match=words):
        train(replace(config, base_quantization=kind), context("SD"))


def test_fine_tunes_are_not_mixed_with_quantised_weights(config: DistillConfig) -> None:
    with pytest.raises(ConfigError, match="train_finetunes must be empty with --base_quantization"):
        replace(config, base_quantization="fp8", train_finetunes=("lit",))
