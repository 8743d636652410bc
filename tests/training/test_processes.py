"""Two processes, also with FSDP, train the guide that one process with both streams trains."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from pilotfish.guides import Guide
from pilotfish.training import trainer
from pilotfish.training.checkpoint import list_checkpoints, saved_streams
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig, TrainingConfig
from pilotfish.training.stages import distill, distill_steps
from pilotfish.training.state import check_distributed
from tests import forked
from tests.training.runs import close, launched, on_two_processes, small_guide, train

# accelerate shards on accelerators alone; this does the same on two CPU processes
SHARDED = """
from accelerate import Accelerator
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from pilotfish.__main__ import run

def prepare(self, student, optimizer):
    whole = sum(p.numel() for p in student.parameters())
    fully_shard(student, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    own = sum(p.to_local().numel() for p in student.parameters())
    assert own < 0.6 * whole, (own, whole)
    optimizer.param_groups[0]["params"] = list(student.parameters())
    return student, self.prepare_optimizer(optimizer)

Accelerator.prepare = prepare
run()
"""


def on_two(config: TrainingConfig, command: str = "distill", script: Path | None = None) -> Path:
    on_two_processes(config, command, script)
    return Path(config.output)


def on_one(config: DistillConfig) -> Path:
    """Both streams on this process."""
    distill(replace(config, train_batch_size=2 * config.train_batch_size, streams=2))
    return Path(config.output)


@forked.NEEDED
@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    saved_base: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # validation as in the other processes
    config = replace(
        saved_base, negative_prompt_prob=0.5, training_samples="on_policy", max_train_steps=6,
        checkpointing_steps=3, validation_steps=6, report_to="tensorboard",
    )  # fmt: skip

    def elsewhere(name: str, **changes: Any) -> DistillConfig:
        return replace(config, output=str(tmp_path / name), **changes)

    launched(elsewhere("two"))
    two, one = tmp_path / "two", on_one(elsewhere("one"))
    assert close(two, one)
    assert not close(two, on_one(elsewhere("other", seed=1)))
    # written once
    histories = [json.loads((folder / "history.json").read_text()) for folder in (one, two)]
    assert [row["step"] for row in histories[1]] == [6]
    errors = [history[0]["guidance_error"] for history in histories]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert json.loads((two / "training.json").read_text())["samples"] == 6 * 8
    assert len(list((two / "logs").rglob("events*"))) == 1
    middle, first = list_checkpoints(two)[0], list_checkpoints(one)[0]
    assert saved_streams(middle) == [0, 1]
    # begun on two, finished on one, and the other way round
    assert close(one, on_one(elsewhere("again", resume_from_checkpoint=str(middle))))
    assert close(one, on_two(elsewhere("back", resume_from_checkpoint=str(first))))


@forked.NEEDED
@pytest.mark.slow
def test_two_processes_do_every_round_of_stage_2(
    saved_base: DistillConfig, tmp_path: Path, make_unet: Any, randomise: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.undo()
    randomise(small_guide(make_unet())).save_pretrained(tmp_path / "initial")
    shared = {field.name: getattr(saved_base, field.name) for field in fields(TrainingConfig)}
    rounds = replace(
        StepsConfig(**shared), steps=(4, 2), guide=str(tmp_path / "initial"),
        report_to="tensorboard",
    )  # fmt: skip
    two = on_two(rounds, "distill-steps")
    one = replace(rounds, output=str(tmp_path / "one"), train_batch_size=8, streams=2)
    distill_steps(one, Guide.from_pretrained(rounds.guide))
    for name in ("steps-4", "steps-2"):
        assert close(two / name, tmp_path / "one" / name)
        assert len(list((two / name / "logs").rglob("events*"))) == 1
    assert not close(two / "steps-4", two / "steps-2")


@forked.NEEDED
@pytest.mark.slow
def test_a_sharded_guide_is_the_guide(saved_base: DistillConfig, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    config = replace(saved_base, gradient_checkpointing=True)

    def elsewhere(name: str, **changes: Any) -> DistillConfig:
        return replace(config, output=str(tmp_path / name), **changes)

    plain = on_one(elsewhere("plain"))
    sharded = on_two(elsewhere("sharded"), script=script)
    assert close(plain, sharded)
    # begun in one way, finished in the other
    first, middle = list_checkpoints(plain)[0], list_checkpoints(sharded)[0]
    assert close(
        plain, on_two(elsewhere("there", resume_from_checkpoint=str(first)), script=script)
    )
    assert close(plain, on_one(elsewhere("back", resume_from_checkpoint=str(middle))))


def test_on_policy_samples_are_refused_under_fsdp(
    config: DistillConfig, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "is_sharded", lambda guide: True)
    on_policy = replace(config, training_samples="on_policy", on_policy_ratio=1.0)
    with pytest.raises(ConfigError, match="on-policy samples are not supported under FSDP"):
        train(on_policy, context())


def test_accelerate_reads_the_examples() -> None:
    folder = Path(__file__).parents[2] / "examples" / "accelerate"
    found = {file.stem: load_config_from_file(str(file)) for file in folder.glob("*.yaml")}
    kinds = {name: config.distributed_type for name, config in found.items()}
    plain = DistributedType.MULTI_GPU
    assert kinds == {"processes": plain, "machines": plain, "fsdp": DistributedType.FSDP}
    assert found["machines"].num_machines == 2
    assert found["fsdp"].fsdp_config["fsdp_version"] == 2


def test_other_kinds_of_distributed_training_are_refused() -> None:
    def on(kind: DistributedType, fsdp2: bool = False) -> Any:
        return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2)

    for kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        with pytest.raises(ConfigError, match=f"{kind.value} is not supported"):
            check_distributed(on(kind))
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        check_distributed(on(DistributedType.FSDP))
    check_distributed(on(DistributedType.FSDP, True))
    for kind in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        check_distributed(on(kind))
