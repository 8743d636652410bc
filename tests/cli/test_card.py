"""``pilotfish card``: what a reader, and the hub, learn of a guide."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard
from PIL import Image

from pilotfish import cli
from pilotfish.cli.settings import parse
from pilotfish.evaluation.results import Result
from pilotfish.evaluation.tables import markdown_table
from pilotfish.guides import TinyGuide
from pilotfish.guides.hub import published
from pilotfish.training.config import DistillConfig, StepsConfig
from pilotfish.training.history import command_line, describe_training

ROOT = Path(__file__).parent.parent.parent
MEASURED = Result.load(ROOT / "results" / "guide.json").guide.parameters
COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
Write = Callable[..., ModelCard]


@pytest.fixture
def guide(unet: Any, randomise: Any, tmp_path: Path) -> Path:
    """A guide's folder, as a training leaves it."""
    network = TinyGuide.for_denoiser(
        unet, "epsilon", rank=4, trained_on={"name": "owner/base", "revision": COMMIT}
    )
    folder = tmp_path / "run" / "guide"
    randomise(network).save_pretrained(folder)
    config = DistillConfig(
        output=str(tmp_path / "run"), prompts=str(tmp_path / "prompts.txt"),
        train_finetunes=(str(tmp_path / "fluent"), "owner/tune"), max_train_steps=2000,
        guide={"text": False},
    )  # fmt: skip
    config.save(tmp_path / "run" / "config.json")
    took = {"steps": 2000, "samples": 128_000, "seconds": 5400.0}
    (tmp_path / "run" / "training.json").write_text(json.dumps(took))
    return folder


@pytest.fixture
def result(guide: Path, tmp_path: Path) -> Result:
    """The committed figures, as if they were of this guide, measured with absolute paths."""
    found = Result.load(ROOT / "results" / "guide.json")
    size = TinyGuide.from_pretrained(guide).num_parameters()
    line = f"pilotfish evaluate --guide {guide} --models base --output={tmp_path}/result.json"
    return dataclasses.replace(
        found,
        guide=dataclasses.replace(found.guide, name=str(guide), parameters=size),
        run=dataclasses.replace(found.run, command=line),
    )


@pytest.fixture
def write(guide: Path, capsys: pytest.CaptureFixture[str]) -> Write:
    """A function that runs the command and reads the card."""

    def run(*flags: str) -> ModelCard:
        code = cli.main(["card", "--guide", str(guide), *flags])
        assert code == 0, capsys.readouterr().err
        return ModelCard.load(guide / "README.md")

    return run


@pytest.fixture
def whole(write: Write, result: Result, guide: Path, tmp_path: Path) -> ModelCard:
    """A card with everything."""
    result.save(tmp_path / "measured.json")
    Image.new("RGB", (4, 4)).save(tmp_path / "drawn.png")
    return write(
        "--result", str(tmp_path / "measured.json"), "--grid", str(tmp_path / "drawn.png"),
        "--license", "apache-2.0", "--push_to_hub", "me/base-guide", "--dry_run",
    )  # fmt: skip


def test_the_header_is_what_the_hub_reads(whole: ModelCard, result: Result) -> None:
    data = whole.data
    assert (data.license, data.library_name) == ("apache-2.0", "pilotfish")
    assert (data.base_model, data.base_model_relation) == ("owner/base", "adapter")
    assert data.pipeline_tag == "text-to-image"
    assert {"pilotfish", "diffusers"} <= set(data.tags)
    assert data.model_name == "base-guide"
    figures = {(e.dataset_type, e.metric_type): e.metric_value for e in data.eval_results}
    for name, model in result.models.items():
        assert figures[name, "guidance_error"] == pytest.approx(model.guidance_error.mean, abs=1e-4)
        assert figures[name, "gain_kept"] == pytest.approx(model.gain_kept, abs=1e-4)
        assert figures[name, "top1"] == pytest.approx(model.scores["guided"].top1, abs=1e-4)
    assert len(figures) == 3 * len(result.models)


def test_the_text_has_base_figures_picture_and_digest(
    whole: ModelCard, result: Result, guide: Path
) -> None:
    text = whole.text
    assert "[owner/base](https://huggingface.co/owner/base)" in text
    assert COMMIT in text
    assert markdown_table(result).strip() in text
    assert "](grid.png)" in text
    assert Image.open(guide / "grid.png").size == (4, 4)
    weights = "diffusion_pytorch_model.safetensors"
    assert sha256((guide / weights).read_bytes()).hexdigest() in text
    assert "2,000 steps, 128,000 samples, 90 minutes." in text
    copied = Result.load(guide / "result.json")
    same = dataclasses.replace(copied, run=result.run, guide=result.guide)
    assert same.to_json() == result.to_json()


@pytest.mark.parametrize("ratio", [0.0, 0.12])
def test_the_text_names_the_ratio_of_steps_with_both_passes(
    write: Write, guide: Path, ratio: float
) -> None:
    network = TinyGuide.from_pretrained(guide)
    network.register_to_config(refresh_ratio=ratio)
    network.save_pretrained(guide)
    text = write("--license", "apache-2.0").text
    assert ("runs both passes in 12% of the steps" in text) == (ratio > 0)


def test_no_folder_of_this_machine_is_told(whole: ModelCard, guide: Path, tmp_path: Path) -> None:
    for name in published(guide):
        content = (guide / name).read_bytes()
        assert str(tmp_path).encode() not in content, name
        assert str(Path.home()).encode() + b"/" not in content, name
    assert "`pilotfish evaluate --guide guide --models base --output=result.json`" in whole.text


def test_its_lines_of_use_run(
    write: Write, make_pipe: Callable[[str], Any], guide: Path, tmp_path: Path
) -> None:
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    text = write("--push_to_hub", "me/guide", "--dry_run").text
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in block.splitlines() if line]) == 5
    here = {
        f'"owner/base", revision="{COMMIT}"': repr(str(tmp_path / "base")),
        '"me/guide"': repr(str(guide)), "steps=25": "steps=2",
    }  # fmt: skip
    for there, path in here.items():
        assert there in block
        block = block.replace(there, path)
    names: dict[str, Any] = {}
    exec(block, names)
    assert isinstance(names["image"], Image.Image)
    assert type(names["pipe"]).__mro__[1].__name__ == "Guided"


def save_again(folder: Path, **fields: Any) -> None:
    """The same guide with other fields in its configuration."""
    guide = TinyGuide.from_pretrained(folder)
    guide.register_to_config(**fields)
    guide.save_pretrained(folder)


def test_a_guide_for_few_steps_brings_its_scheduler(write: Write, guide: Path) -> None:
    save_again(guide, times=[0.999, 0.749, 0.499, 0.249])
    text = write().text
    assert "4 sampling steps" in text
    assert "num_inference_steps=4" in text
    assert f"{DDIMScheduler.__name__}.from_config" in text


def test_without_figures_it_says_so(write: Write, guide: Path) -> None:
    card = write()
    assert "No measurements are recorded." in card.text
    assert card.data.eval_results is None
    assert card.data.license is None
    assert "Not stated." in card.text
    assert published(guide) == ["README.md", "config.json", "diffusion_pytorch_model.safetensors"]


def test_what_is_asked_for_goes_over_what_is_remembered(write: Write) -> None:
    card = write("--base_model", "other/base", "--revision", "v1")
    assert card.data.base_model == "other/base"
    assert 'from_pretrained("other/base", revision="v1")' in card.text
    assert COMMIT not in card.text
    assert COMMIT in write("--base_model", "owner/base").text


@pytest.mark.parametrize("name", ["my-base", None])
def test_a_base_that_is_no_hub_id_stays_out_of_the_header(
    name: str | None, write: Write, guide: Path
) -> None:
    save_again(guide, trained_on=name and {"name": name})
    card = write()
    assert card.data.base_model is None
    assert (name or "an unnamed base") in card.text
    assert "huggingface.co" not in card.text


def test_what_is_not_a_number_stays_out_of_the_header(
    write: Write, result: Result, tmp_path: Path
) -> None:
    name, model = next(iter(result.models.items()))
    models = {name: dataclasses.replace(model, gain_kept=math.nan)}
    dataclasses.replace(result, models=models).save(tmp_path / "r.json")
    card = write("--result", str(tmp_path / "r.json"))
    kinds = [e.metric_type for e in card.data.eval_results]
    assert kinds == ["guidance_error", "top1"]


def test_where_cfg_gains_nothing_none_of_it_is_kept(
    write: Write, result: Result, tmp_path: Path
) -> None:
    name, model = next(iter(result.models.items()))
    models = {name: dataclasses.replace(model, scores=model.scores | {"cfg": model.scores["none"]})}
    dataclasses.replace(result, models=models).save(tmp_path / "r.json")
    figures = write("--result", str(tmp_path / "r.json")).data.eval_results
    assert "gain_kept" not in {e.metric_type for e in figures}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--result", "{other}"), f"is of a guide with {MEASURED:,} parameters, and this one has"),
        (("--result", "{none}"), "no result could be read"),
        (("--grid", "{none}"), "none"),
        (("--base_model", "no base/"), "Repo id must"),
        (("--training", "{none}"), "no configuration could be read"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_no_card(
    flags: tuple[str, str], sentence: str, guide: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"other": ROOT / "results" / "guide.json", "none": tmp_path / "none"}
    capsys.readouterr()
    assert cli.main(["card", "--guide", str(guide), *(f.format(**places) for f in flags)]) == 1
    assert sentence in capsys.readouterr().err
    assert not (guide / "README.md").exists()


def test_a_card_that_is_there_is_uploaded_as_it_is(write: Write, guide: Path) -> None:
    write("--license", "apache-2.0")
    assert write("--push_to_hub", "me/guide", "--dry_run").data.license == "apache-2.0"
    assert write("--push_to_hub", "me/guide", "--dry_run", "--license", "mit").data.license == "mit"


def test_a_card_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["card", "--guide", "owner/guide"]) == 1
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(output="runs/x"),
        DistillConfig(
            output="runs/x", pretrained_model_name_or_path="owner/base",
            train_finetunes=("a", "b"), learning_rate=1e-4, guide_type="external",
            guide={"rounds": 2},
            negative_prompt_prob=0.25, prompts="my prompts.txt", gradient_checkpointing=True,
        ),
        StepsConfig(output="runs/x", steps=(8, 4), guide="runs/x/guide"),
    ],
)  # fmt: skip
def test_the_command_repeats_the_training(config: Any) -> None:
    _, name, *words = shlex.split(command_line(config))
    kind = type(config)
    assert parse(words, kind, name, "") == config


def test_what_makes_no_difference_is_left_out(tmp_path: Path) -> None:
    config = DistillConfig(
        output=str(tmp_path),
        resume_from_checkpoint="latest",
        report_to="none",
        checkpointing_steps=3,
    )
    config.save(tmp_path / "config.json")
    line = f"pilotfish distill --output {tmp_path.name}"
    assert describe_training(tmp_path) == f"```bash\n{line}\n```"


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_record_of_the_training_is_named(
    guide: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = guide.parent / "training.json"
    record.write_text(text)
    assert cli.main(["card", "--guide", str(guide)]) != 0
    assert f"{record}" in capsys.readouterr().err
