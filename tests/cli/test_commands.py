"""The command line as its user meets it: help, one plain sentence for a mistake, no loss."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from PIL import Image

from pilotfish import bundled, cli
from pilotfish.backbones import Backbone
from pilotfish.cli import demo, names
from pilotfish.guides import Guide
from tests import components
from tests.cli.conftest import Say


def test_without_a_command_it_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code in (0, None)
    shown = capsys.readouterr().out
    assert f"pilotfish {name}" in shown
    assert "options" in shown


def test_an_unknown_command_is_named(say: Say) -> None:
    code, error = say("destill")
    assert code == 2
    assert "no command 'destill'" in error


def test_an_unknown_flag_is_named(say: Say) -> None:
    code, error = say("distill", "--output", "x", "--lerning_rate", "1")
    assert code == 2
    assert "lerning_rate" in error


OUT_OF_RANGE = {
    "distill --rank -1": "rank must be at least 0, not -1",
    "distill --guide_type huge": "guide_type must be one of external, full, tiny",
    "distill --learning_rate 0": "learning_rate must be above 0",
    "distill --guidance_scale_min 0.5": "guidance_scale_min must be at least 1",
    "distill --pool 4": "pool must be at least train_batch_size",
    "distill --training_samples dreams": "dreams",
    "distill --guide_type dice --trained_scale 3 --guidance_scale_max 5": "5.0",
    "distill-steps --steps 16 7": "each half of the one before",
    "distill-steps --teacher_scale_multiplier 1.5": "must be 1 unless the teacher is cfg",
}


@pytest.mark.parametrize(("line", "sentence"), OUT_OF_RANGE.items())
def test_a_value_out_of_range_is_named(say: Say, line: str, sentence: str) -> None:
    code, error = say(*line.split(), "--output", "unused")
    assert code in (1, 2)
    assert sentence in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


MISTAKES = {
    "distill {out} --config {none}": "no configuration could be read",
    "distill {out} --config": "--config needs a value",
    "distill {out} --config={wrong}": "guide_type must be one of",
    "distill {out} --config={half}": "rank must be a valid integer",
    "distill-steps --output {used}": "holds rounds of an earlier run",
    "distill {out} --config {unknown}": "unknown settings: colour",
    "distill {out} --prompts {none}": "none.txt",
    "distill {out} --prompts {empty}": "empty.txt",
    "distill {out} {of} {none} --prompts {prompts}": "no pipeline could be loaded from",
    "distill {out} {of} {base}": "--prompts is needed with a base of your own",
    "distill {out} {of} {base} --prompts {prompts} --training_samples noised":
        "noised needs --train_images with a base of your own",
    "distill {out} {of} {base} --prompts {prompts} --train_finetunes {none}":
        "no fine-tune could be loaded",
    "distill {out} --init_from {none}": "no guide could be read",
    "distill {out} --init_from tiny --no_text":
        "Cannot continue training tiny: text is True in the guide, False in the configuration.",
    "distill {out} --init_from tiny --uncond_templates=2": ", 2 in the configuration",
    "distill-steps {out} --guide {none}": "no guide could be read",
    "sample": "no prompt: give --prompt TEXT or --prompts FILE",
    "sample -p owl --guide {none}": "no guide could be read",
    "sample -p owl --guide {broken}": "no guide could be read",
    "sample -p owl --guide {guide}": "was made for another denoiser",
    "sample -p owl --num_inference_steps 0": "num_inference_steps must be at",
    "sample -p owl --batch_size -1": "batch_size must be at least 1",
    "sample -p owl --num_images_per_prompt 0": "must be at least 1, not 0",
    "sample -p owl --refresh -1": "refresh must be a number of steps, at least 0",
    "sample -p owl --refresh_at 2 -1": "or a list of steps counted from 0",
    "sample -p owl --refresh 1 --refresh_at 2": "cannot be combined",
    "sample -p owl --models {none}": "no pipeline could be loaded from",
    "sample -p owl --models {base} --variant fp16": "no pipeline could be",
    "sample -p owl --device nowhere": "--device nowhere cannot be used",
    "app --models {base} --guide tiny": "no guide fits the model",
    "app --models {base} --guide {none}": "no guide could be read",
    "evaluate --samples 1": "at least two samples",
    "evaluate --batch_size 0": "batch_size must be at least 1",
    "evaluate --guidance_scale 1": "CFG gains nothing at w = 1",
    "evaluate --validation_prompts {empty}": "empty.txt",
    "evaluate --reference_images {unused}": "belongs to no model",
    "evaluate --models base {base}": "two models are called base",
    "evaluate --models fluent {none}": "no pipeline could be loaded from",
    "evaluate --models {base} --reference_images {base}": "has no metadata.jsonl",
    "evaluate --clip {none}": "no CLIP in",
    "evaluate --inception_weights {none}": "no Inception weights in",
    "evaluate --output {base}": "is a folder; give the name of a file",
    "evaluate --grid {base}": "is a folder; give the name of a file",
    "benchmark --guidance_scale 1": "only for w above 1",
    "benchmark --rounds 0": "at least one round",
    "benchmark --num_inference_steps 0": "at least one step",
    "benchmark --device nowhere": "--device nowhere cannot be used",
}  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), MISTAKES.items())
def test_a_mistake_is_one_sentence(
    say: Say, line: str, sentence: str, base: str, guide: str, prompts: str, tmp_path: Path
) -> None:
    for file, settings in {
        "wrong": {"guide_type": "tyni"}, "half": {"guide": {"rank": 1.5}},
        "unknown": {"colour": "red"},
    }.items():  # fmt: skip
        (tmp_path / f"{file}.json").write_text(json.dumps({"output": "x"} | settings))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "used" / "steps-8").mkdir(parents=True)
    Guide.from_pretrained(guide).save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    files = ("none.txt", "empty.txt", "wrong.json", "half.json", "unknown.json", "used", "broken")
    places = {Path(file).stem: str(tmp_path / file) for file in (*files, "unused")} | {
        "base": base, "guide": guide, "prompts": prompts, "out": f"--output={tmp_path / 'out'}",
        "of": "--pretrained_model_name_or_path",
    }  # fmt: skip
    code, error = say(*(word.format(**places) for word in line.split()))
    assert code == 1
    (shown,) = error.strip().splitlines()
    assert shown.startswith(f"pilotfish {line.split()[0]}: ")
    assert sentence in shown


@pytest.mark.parametrize(
    "line",
    ["sample -p owl --output {out} --models", "inspect --scales {out} --models",
     "benchmark --models"],
)  # fmt: skip
def test_a_pipeline_that_takes_no_guide_is_refused_before_anything_is_drawn(
    say: Say, line: str, tmp_path: Path
) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDIMPipeline(unet, components.scheduler("epsilon")).save_pretrained(tmp_path / "plain")
    out = tmp_path / "out"
    code, error = say(*(word.format(out=out) for word in line.split()), str(tmp_path / "plain"))
    known = ", ".join(c.__name__ for family in Backbone.registry for c in family.denoisers)
    why = (
        "DDIMPipeline cannot take a guide: UNet2DModel belongs to no family that takes a guide; "
        f"known: {known}; use it without one"
    )
    assert (code, error.strip()) == (1, f"pilotfish {line.split()[0]}: {why}")
    assert not out.exists()


def test_samples_are_saved_with_their_grid(say: Say, base: str, guide: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    flags = (
        "--models", base, "--guide", guide, "--num_inference_steps", "2", "--output", str(folder),
        "--num_images_per_prompt", "2", "--seed", "7",
    )  # fmt: skip
    code, _ = say("sample", "-p", "A cat!", "🦉", *flags)
    names = ["a-cat-7.png", "a-cat-8.png", "grid.png", "image-10.png", "image-9.png"]
    assert (code, sorted(p.name for p in folder.iterdir())) == (0, names)
    image, grid = (Image.open(folder / name).convert("RGB") for name in ("image-9.png", names[2]))
    assert grid.size == (2 * image.width, 2 * image.height)
    assert grid.crop((0, image.height, image.width, 2 * image.height)) == image
    half = tmp_path / "half"
    code, _ = say("sample", "-p", "A cat!", *flags[:7], str(half), "--dtype", "bfloat16")
    assert (code, len([*half.iterdir()])) == (0, 2)


def test_steps_with_both_passes_are_chosen_by_number_or_by_place(
    say: Say, base: str, guide: str, tmp_path: Path
) -> None:
    """In all of them the image is that of CFG."""
    flags = ("-p", "cat", "--models", base, "--guide", guide, "--num_inference_steps", "2")
    chosen: dict[str, tuple[str, ...]] = {
        "cfg": ("--mode", "cfg"), "all": ("--refresh", "2"), "listed": ("--refresh_at", "0", "1"),
        "one": ("--refresh", "1"), "first": ("--refresh_at", "0"), "none": (),
    }  # fmt: skip
    images = {}
    for name, more in chosen.items():
        code, error = say("sample", *flags, *more, "--output", str(tmp_path / name))
        assert code == 0, error
        images[name] = Image.open(tmp_path / name / "cat-0.png").convert("RGB").tobytes()
    assert images["all"] == images["listed"] == images["cfg"]
    assert images["one"] == images["first"]
    assert len(set(images.values())) == 3


def test_each_of_several_models_has_a_folder(say: Say, base: str, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(base)
    flags = ("--mode", "none", "--num_inference_steps", "1", "--output", str(tmp_path / "out"))
    code, _ = say("sample", "-p", "cat", "--models", base, str(tmp_path / "other"), *flags)
    assert (code, sorted(p.name for p in tmp_path.glob("out/*"))) == (0, ["base", "other"])
    code, error = say("sample", "-p", "cat", "--models", base, "base", *flags)
    assert (code, "two models are called base" in error) == (1, True)


def pickled(folder: Path) -> None:
    """A model with a pickle in place of its weights."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save({"a": torch.zeros(1)}, weights.with_suffix(".bin"))
    weights.unlink()


def test_a_pickle_is_refused(say: Say, guide: str) -> None:
    pickled(Path(guide))
    code, error = say("sample", "-p", "owl", "--guide", guide)
    assert code == 1
    assert "no guide could be read" in error


def test_a_base_of_pickles_is_refused(say: Say, base: str, prompts: str, tmp_path: Path) -> None:
    pickled(Path(base) / "unet")
    code, error = say(
        "distill", "--output", str(tmp_path / "out"), "--prompts", prompts,
        "--pretrained_model_name_or_path", base,
    )  # fmt: skip
    assert code == 1
    assert "no pipeline could be loaded" in error


def test_ctrl_c_is_no_traceback(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "command", lambda name: pressed)
    code, error = say("distill")
    assert code == 130
    assert "interrupted; what was saved is kept" in error


def test_a_scale_outside_the_trained_range_warns(
    say: Say, base: str, guide: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"guidance_scale 9\.0 lies outside \[1\.0, 8\.0\]"):
        code, _ = say(
            "sample", "-p", "cat", "--models", base, "--guide", guide,
            "--guidance_scale", "9", "--num_inference_steps", "2",
            "--output", str(tmp_path / "out"),
        )  # fmt: skip
    assert code == 0


def test_a_new_demo_deletes_its_own_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: Any) -> Guide:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "distill", interrupted)
    folders = [tmp_path / name / "guide" for name in ("distill", demo.TRAINING)]
    for folder in folders:
        folder.mkdir(parents=True)
    assert (
        cli.main(["demo", "--output", str(tmp_path), "--resume_from_checkpoint", "latest"]) == 130
    )
    assert [folder.exists() for folder in folders] == [True, True]
    assert cli.main(["demo", "--output", str(tmp_path)]) == 130
    assert [folder.exists() for folder in folders] == [True, False]


def test_a_demo_shows_both_guides_and_the_recorded_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Any] = []

    def distill(config: Any) -> Guide:
        trained.append(config)
        history = Path(config.output) / "history.json"
        history.write_text(json.dumps([{"step": 1, "guidance_error": 0.456}]))
        return bundled.load_guide()

    monkeypatch.setattr(demo, "distill", distill)
    flags = ["--num_inference_steps", "1", "--rounds", "1", "--output", str(tmp_path)]
    assert cli.main(["demo", *flags]) == 0
    assert trained[0].resume_from_checkpoint is None
    assert len(Path(trained[0].prompts).read_text().splitlines()) > 1000
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    bases = [base for base in bundled.BASES if bundled.guide_names(base)]
    columns = sum((4 if base == "base" else 3) * len(bundled.BASES[base]) for base in bases)
    shown = columns * len(bundled.GRID_PROMPTS)
    assert len(re.findall('<img src="data:image/png;base64,', page)) == shown
    recorded = json.loads(demo.RECORDED.read_text(encoding="utf-8"))
    assert recorded["run"]["command"] in page
    assert "<b>0.46</b>" in page
    for base in bases:
        assert re.search(rf"<b>\d+\.\d\d×</b> as fast as CFG on {base}", page)
    assert "speed at batch 8" in capsys.readouterr().out
    monkeypatch.setattr(demo, "RECORDED", tmp_path / "none.json")
    assert demo.recorded_table() is None


@pytest.mark.parametrize("encoding", ["ascii", "cp1251"])
def test_a_terminal_that_is_not_utf8_shows_what_it_can(encoding: str, tmp_path: Path) -> None:
    script = "import sys; from pilotfish import cli\n"
    script += "cli.command = lambda name: lambda arguments: print('2.07× 猫', flush=True)\n"
    script += "sys.exit(cli.main(['demo']) or cli.main(['猫', '--flag']))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"2.07? ?\n")
    assert b"no command '?'" in done.stderr


def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """A package that has not been imported yet."""
    for name in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("command", "missing", "sentence"),
    [
        ("app", "gradio", "gradio is not installed: run pip install 'pilotfish[app]', or in a"),
        ("sample", "tqdm", "tqdm is not installed: run pip install 'pilotfish[training]'"),
        ("compare", "baselines", "clone the repository and run pip install -e . there"),
        ("benchmark", "benchmarks", "clone the repository and run pip install -e . there"),
    ],
)
def test_a_missing_package_is_one_sentence(
    say: Say, monkeypatch: pytest.MonkeyPatch, command: str, missing: str, sentence: str
) -> None:
    forget(monkeypatch, missing)
    for name in (cli.COMMANDS[command][1], "pilotfish.app.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    code, error = say(command)
    (line,) = error.strip().splitlines()
    assert code == 1
    assert sentence in line


@pytest.mark.parametrize("files", [("__init__.py",), ("__init__.py", "command.py")])
def test_another_package_called_baselines_counts_as_none(
    say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: tuple[str, ...]
) -> None:
    forget(monkeypatch, "baselines")
    (tmp_path / "baselines").mkdir()
    for file in files:
        (tmp_path / "baselines" / file).write_text("" if len(files) > 1 else "import gym_of_none")
    monkeypatch.syspath_prepend(tmp_path)
    cli.command("sample")
    assert names.named_methods([]) == {}
    code, error = say("compare")
    assert (code, error.count("\n")) == (1, 1)
    assert "clone the repository and run pip install -e . there" in error
    sys.modules.pop("baselines", None)  # the other one


def test_a_missing_module_of_the_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "demo", ("all", "pilotfish.cli.none", ""))
    with pytest.raises(ModuleNotFoundError, match=r"pilotfish\.cli\.none"):
        cli.main(["demo"])
