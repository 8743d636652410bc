"""Prompts that stay on the disk while a guide is trained on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import distill
from tests.data.test_prompts import shard

TEXTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]


@pytest.fixture
def config(
    make_pipe: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DistillConfig:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    return DistillConfig(
        output=str(tmp_path / "run"), pretrained_model_name_or_path=str(tmp_path / "base"),
        train_batch_size=4, max_train_steps=4, pool=8, replay_capacity=8, guide={"rank": 4},
        checkpointing_steps=2, checkpoints_total_limit=None, validation_steps=4,
        lr_warmup_steps=1, negative_prompt_prob=0.5, report_to="none",
    )  # fmt: skip


def weights(config: DistillConfig) -> dict[str, Any]:
    return load_file(f"{config.output}/guide/diffusion_pytorch_model.safetensors")


def test_data_sets_train_what_a_text_file_trains(config: DistillConfig, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    pq.write_table(pa.table({"n": [1] * len(TEXTS), "said": TEXTS}), tmp_path / "p.parquet",
                   row_group_size=2)  # fmt: skip
    text = replace(config, prompts=str(tmp_path / "p.txt"))
    column = replace(
        config, prompts=str(tmp_path / "p.parquet"), caption_column="said",
        output=str(tmp_path / "column"),
    )  # fmt: skip
    shard(tmp_path / "p.tar", TEXTS)
    shards = replace(config, prompts=str(tmp_path / "p.tar"), output=str(tmp_path / "shards"))
    resumed = replace(column, output=str(tmp_path / "resumed"),
                      resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))  # fmt: skip
    other = replace(text, output=str(tmp_path / "other"), seed=1)
    for one in (text, column, shards, resumed, other):
        distill(one)
    first = weights(text)
    for again in (weights(column), weights(shards), weights(resumed)):
        assert all((value == again[name]).all() for name, value in first.items())
    assert any((value != weights(other)[name]).any() for name, value in first.items())


# The prompts are encoded when they are asked for, as those of a full-size model always are.
TRAIN = """
import json, sys
from dataclasses import replace
from pathlib import Path
import pilotfish.training.context as context
from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import GuidanceTrainer, new_guide
from benchmarks.memory import peak_bytes
from pilotfish.conditioning import encoded
import torch

def peak(call):
    return peak_bytes(call, torch.device("cpu"))

context.encoded = lambda pipe, texts: encoded(pipe, texts, cache_bytes=0)
found = []
for prompts in sys.argv[2:]:
    config = DistillConfig.load(Path(sys.argv[1]))
    one = replace(config, prompts=prompts, output=prompts + ".run")
    made = []
    def train():
        made.append(context.TrainingContext.from_config(one))
        GuidanceTrainer(one, made[0], new_guide(one, made[0]), print).run()
    before = peak(lambda: None)
    more = peak(train) - before
    found.append([len(made[0].prompts), more])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_prompts_are_not_held_in_memory(config: DistillConfig, tmp_path: Path) -> None:
    count, words = 70_000, "a cat " * 400
    # first few, so that what the libraries themselves take is not counted
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "few.parquet")
    texts = [f"{i} {words}" for i in range(count)]
    (tmp_path / "many.txt").write_text("\n".join(texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "many.parquet", row_group_size=2500)
    whole = sum(map(len, texts))
    config.save(tmp_path / "config.json")
    names = ("few.parquet", "many.txt", "many.parquet")
    files = [str(tmp_path / name) for name in names]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path / "config.json"), *files],
        capture_output=True, text=True, check=False,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    _, (lines, text), (rows, parquet) = json.loads(done.stdout.splitlines()[-1])
    print(f"{whole / 1e6:.0f} MB of text; more memory: {text / 1e6:.0f} and {parquet / 1e6:.0f} MB")
    assert lines == rows == count
    assert max(text, parquet) < whole / 2
