"""FSDP on two real processes, each with a part of the guide: the same guide comes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from pilotfish.training.checkpoints import list_checkpoints
from pilotfish.training.config import ConfigError, DistillConfig
from pilotfish.training.sharding import check
from pilotfish.training.stages import distill

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]
WEIGHTS = "guide/diffusion_pytorch_model.safetensors"
# accelerate shares out on accelerators alone; this is what it does there, on two processors
SHARED_OUT = """
from accelerate import Accelerator
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from pilotfish.__main__ import run

def prepare(self, student, optimizer):
    whole = sum(p.numel() for p in student.parameters())
    fully_shard(student, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    mine = sum(p.to_local().numel() for p in student.parameters())
    assert mine < 0.6 * whole, (mine, whole)
    optimizer.param_groups[0]["params"] = list(student.parameters())
    return student, self.prepare_optimizer(optimizer)

Accelerator.prepare = prepare
run()
"""


@pytest.fixture
def config(make_pipe: Callable[[str], Any], tmp_path: Path) -> DistillConfig:
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "shared_out.py").write_text(SHARED_OUT)
    return DistillConfig(
        output_dir=str(tmp_path / "run"), pretrained_model_name_or_path=str(tmp_path / "base"),
        prompts=str(tmp_path / "prompts.txt"), train_batch_size=4, max_train_steps=8, pool=8,
        replay_capacity=8, trajectory_steps_min=2, trajectory_steps_max=4, checkpointing_steps=4,
        checkpoints_total_limit=None, validation_steps=4, lr_warmup_steps=1, report_to="none",
    )  # fmt: skip


def run(config: DistillConfig) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The command on two processes that share the guide out."""
    folder = Path(config.output_dir)
    file = folder.with_suffix(".json")
    config.save(file)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(folder.with_name("shared_out.py")), "distill", "--config", str(file)],
        capture_output=True, text=True, check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return folder, done


def trained(config: DistillConfig, name: str, shared_out: bool, **changes: Any) -> Path:
    """On two processes that share the guide out, or with both their streams on this one."""
    given = replace(config, output_dir=str(Path(config.output_dir).with_name(name)), **changes)
    if not shared_out:
        distill(replace(given, train_batch_size=2 * given.train_batch_size, streams=2))
        return Path(given.output_dir)
    folder, done = run(given)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def close(one: Path, two: Path) -> bool:
    a, b = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    return all(torch.allclose(v, b[k], rtol=1e-3, atol=1e-5) for k, v in a.items())


@pytest.mark.slow
def test_a_guide_that_is_shared_out_is_the_guide(config: DistillConfig) -> None:
    config = replace(config, gradient_checkpointing=True)
    plain = trained(config, "plain", False)
    shared = trained(config, "shared", True)
    assert close(plain, shared)
    assert not close(plain, trained(config, "other", True, seed=1))
    # begun in one way, ended in the other
    for name, begun, shared_out in (("there", plain, True), ("back", shared, False)):
        middle = str(list_checkpoints(begun)[0])
        assert close(plain, trained(config, name, shared_out, resume=middle))


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused(config: DistillConfig) -> None:
    _, done = run(replace(config, states="student", student_share=1.0))
    assert done.returncode != 0
    assert "under FSDP the student cannot step states by itself" in done.stderr


def test_accelerate_reads_the_examples() -> None:
    folder = Path(__file__).parents[2] / "examples" / "accelerate"
    found = {file.stem: load_config_from_file(str(file)) for file in folder.glob("*.yaml")}
    kinds = {name: config.distributed_type for name, config in found.items()}
    plain = DistributedType.MULTI_GPU
    assert kinds == {"processes": plain, "machines": plain, "fsdp": DistributedType.FSDP}
    assert found["machines"].num_machines == 2
    assert found["fsdp"].fsdp_config["fsdp_version"] == 2


def test_other_ways_of_sharing_out_are_refused() -> None:
    def on(kind: DistributedType, fsdp2: bool = False) -> Any:
        return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2)

    for kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        with pytest.raises(ConfigError, match=f"{kind.value} is not supported"):
            check(on(kind))
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check(on(DistributedType.FSDP))
    check(on(DistributedType.FSDP, True))
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        check(on(kind))
