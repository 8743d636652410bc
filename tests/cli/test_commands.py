"""The command line as its user meets it: help, one plain sentence for a mistake, no loss."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pilotfish import cli
from pilotfish.cli.names import judge
from pilotfish.distill.config import DistillConfig
from pilotfish.distill.trained import trained
from pilotfish.guides import Guide, TinyGuide

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]


@pytest.fixture
def base(make_pipe: Callable[[str], Any], tmp_path: Path) -> str:
    """A pipeline's folder."""
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "prompts.txt")


@pytest.fixture
def guide(make_pipe: Callable[[str], Any], randomise: Any, tmp_path: Path) -> str:
    """A guide's folder."""
    unet = make_pipe("epsilon").unet
    randomise(TinyGuide.for_denoiser(unet, "epsilon", rank=4)).save_pretrained(tmp_path / "guide")
    return str(tmp_path / "guide")


RIVALS = ("agd", "agd-attention", "dice", "cfg-lora", "guided-distillation")
Say = Callable[..., tuple[int, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command; gives its exit code and what it said to its user as an error."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # the parser of flags
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return run


SHORT = (
    "--train_batch_size", "4", "--max_train_steps", "4", "--pool", "8", "--replay_capacity", "8",
    "--checkpointing_steps", "2", "--validation_steps", "4", "--report_to", "none",
    "--lr_warmup_steps", "1",
)  # fmt: skip


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
    code, error = say("distill", "--output_dir", "x", "--lerning_rate", "1")
    assert code == 2
    assert "lerning_rate" in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("distill", "--rank", "-1"), "rank must be at least 0, not -1"),
        (("distill", "--learning_rate", "0"), "learning_rate must be above 0"),
        (("distill", "--guidance_scale_min", "0.5"), "guidance_scale_min must be at least 1"),
        (("distill", "--pool", "4"), "pool must be at least train_batch_size"),
        (("distill", "--states", "dreams"), "dreams"),
        (("distill", "--guide", "dice"), "guidance_scale_min and guidance_scale_max differ"),
        (("distill-steps", "--steps", "16", "7"), "each half of the one before"),
    ],
)
def test_a_value_out_of_range_is_named(say: Say, flags: tuple[str, ...], sentence: str) -> None:
    code, error = say(*flags, "--output_dir", "unused")
    assert code == 2
    assert sentence in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("distill", "--output_dir", "{out}", "--config", "{none}"), "no configuration could be read"),
    (("distill", "--output_dir", "{out}", "--config"), "--config needs the path"),
    (("distill", "--output_dir", "{out}", "--config={wrong}"), "guide must be one of tiny"),
    (("distill", "--output_dir", "{out}", "--config={half}"), "rank must be a whole number"),
    (("distill-steps", "--output_dir", "{used}"), "holds rounds of an earlier run"),
    (("distill", "--output_dir", "{out}", "--config", "{unknown}"), "unknown settings: colour"),
    (("distill", "--output_dir", "{out}", "--prompts", "{none}"), "none.txt"),
    (("distill", "--output_dir", "{out}", "--prompts", "{empty}"), "empty.txt"),
    (
        ("distill", "--output_dir", "{out}", "--pretrained_model_name_or_path", "{none}"),
        "no pipeline could be loaded from",
    ),
    (
        ("distill", "--output_dir", "{out}", "--pretrained_model_name_or_path", "{base}"),
        "--prompts is needed with a base of your own",
    ),
    (
        ("distill", "--output_dir", "{out}", "--practice", "{none}"),
        "no fine-tune could be loaded",
    ),
    (("distill-steps", "--output_dir", "{out}", "--guide", "{none}"), "no guide could be read"),
    (("sample",), "nothing to draw"),
    (("sample", "-p", "owl", "--guide", "{none}"), "no guide could be read"),
    (("sample", "-p", "owl", "--guide", "{broken}"), "no guide could be read"),
    (
        ("sample", "-p", "owl", "--guide", "{guide}"),
        "was made for another denoiser",
    ),
    (("evaluate", "--samples", "1"), "at least two samples"),
    (("evaluate", "--guidance_scale", "1"), "nothing to keep of CFG at w = 1"),
    (("evaluate", "--held_out_prompts", "{empty}"), "empty.txt"),
    (("evaluate", "--pictures", "{out}"), "belongs to no host"),
    (("evaluate", "--hosts", "base", "{base}"), "two hosts are called base"),
    (("sweep", "--samples", "0"), "at least two samples"),
    (("benchmark", "--guidance_scale", "1"), "only for w above 1"),
    (("benchmark", "--rounds", "0"), "at least one round"),
    (("benchmark", "--output", "{out}"), "add --shape"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence(
    say: Say, arguments: tuple[str, ...], sentence: str, base: str, guide: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "wrong.json").write_text(json.dumps({"output_dir": "x", "guide": "tyni"}))
    (tmp_path / "half.json").write_text(json.dumps({"output_dir": "x", "rank": 1.5}))
    (tmp_path / "used" / "steps-8").mkdir(parents=True)
    (tmp_path / "unknown.json").write_text(json.dumps({"output_dir": "x", "colour": "red"}))
    broken = Guide.from_pretrained(guide)
    broken.save_pretrained(tmp_path / "broken")
    weights = tmp_path / "broken" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    places = {
        "out": tmp_path / "out", "none": tmp_path / "none.txt", "empty": tmp_path / "empty.txt",
        "unknown": tmp_path / "unknown.json", "base": base, "guide": guide,
        "broken": tmp_path / "broken", "wrong": tmp_path / "wrong.json",
        "half": tmp_path / "half.json", "used": tmp_path / "used",
    }  # fmt: skip
    code, error = say(*(a.format(**places) for a in arguments))
    (line,) = error.strip().splitlines()
    assert code == 1
    assert line.startswith(f"pilotfish {arguments[0]}: ")
    assert sentence in line


def test_a_pickle_is_refused(say: Say, guide: str) -> None:
    weights = Path(guide) / "diffusion_pytorch_model.safetensors"
    torch.save({"a": torch.zeros(1)}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    code, error = say("sample", "-p", "owl", "--guide", guide)
    assert code == 1
    assert "no guide could be read" in error


def test_a_base_of_pickles_is_refused(say: Say, base: str, prompts: str, tmp_path: Path) -> None:
    weights = Path(base) / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({"a": torch.zeros(1)}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    code, error = say(
        "distill", "--output_dir", str(tmp_path / "out"), "--prompts", prompts,
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
            "sample", "-p", "cat", "--pretrained_model_name_or_path", base, "--guide", guide,
            "--guidance_scale", "9", "--num_inference_steps", "2",
            "--output_dir", str(tmp_path / "out"),
        )  # fmt: skip
    assert code == 0


def test_both_stages_from_a_base_of_ones_own(
    say: Say, base: str, prompts: str, tmp_path: Path
) -> None:
    """Distil, halve the steps twice, draw with the last guide; resume does nothing twice."""
    own = ("--pretrained_model_name_or_path", base)
    texts = ("--prompts", prompts, "--validation_prompts", prompts)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert say("distill", *own, *texts, "--output_dir", first, *SHORT)[0] == 0
    steps = (
        "distill-steps", *own, *texts, "--guide", f"{first}/guide", "--steps", "4", "2",
        "--output_dir", second, *SHORT,
    )  # fmt: skip
    assert say(*steps)[0] == 0
    four, made = (
        Path(second) / f"steps-{n}" / "guide" / "diffusion_pytorch_model.safetensors"
        for n in (4, 2)
    )
    when, before = four.stat().st_mtime_ns, load_file(made)
    shutil.rmtree(made.parent)
    shutil.rmtree(made.parent.parent / "checkpoint-4")  # as if it had been stopped at step 2
    assert say(*steps, "--resume", "latest")[0] == 0
    assert four.stat().st_mtime_ns == when
    again = load_file(made)
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert (Path(second) / "steps-4" / "validation" / "step-4.png").is_file()
    told = trained(made.parent.parent)
    assert "--steps 4 2" in told
    assert "8 steps, 32 samples" in told
    assert "steps-2" not in told
    assert "--steps 4\n" in trained(four.parent.parent)
    with warnings.catch_warnings():  # steps and scheduler are the guide's own
        warnings.simplefilter("error", UserWarning)
        code, _ = say(
            "sample", "-p", "cat", "dog", *own, "--guide", str(made.parent), "--negative_prompt",
            "", "--output_dir", str(tmp_path / "pictures"), "--sheet", str(tmp_path / "sheet.png"),
        )  # fmt: skip
    assert code == 0
    assert Image.open(tmp_path / "sheet.png").width > 32


def test_prompts_of_ones_own_are_held_out_only_if_they_are(
    base: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--pretrained_model_name_or_path", base, "--prompts", prompts)
    assert cli.main(["distill", *own, *SHORT, "--output_dir", str(tmp_path / "one")]) == 0
    assert "(on training prompts)" in capsys.readouterr().out
    apart = ("--validation_prompts", prompts)
    assert cli.main(["distill", *own, *apart, *SHORT, "--output_dir", str(tmp_path / "two")]) == 0
    assert "(held out)" in capsys.readouterr().out


def test_the_embedded_judge_says_that_it_knows_emoji_alone() -> None:
    with pytest.warns(UserWarning, match="sd15 is judged by the embedded judge"):
        judge(None, ["base", "sd15"])


@pytest.mark.parametrize("kind", ["external", "full", *RIVALS])
def test_every_kind_is_distilled_and_used(
    say: Say, base: str, prompts: str, tmp_path: Path, kind: str
) -> None:
    own = ("--pretrained_model_name_or_path", base)
    one_scale = ("--guidance_scale_min", "4", "--guidance_scale_max", "4")
    code, _ = say(
        "distill", *own, "--prompts", prompts, "--output_dir", str(tmp_path / "run"), *SHORT,
        "--guide", kind, *(one_scale if kind in ("dice", "cfg-lora") else ()),
    )  # fmt: skip
    assert code == 0
    code, _ = say(
        "sample", "-p", "cat", *own, "--guide", str(tmp_path / "run" / "guide"),
        "--num_inference_steps", "2", "--output_dir", str(tmp_path / "pictures"),
    )  # fmt: skip
    assert code == 0


def test_a_run_is_repeated_from_its_own_file(
    say: Say, base: str, prompts: str, tmp_path: Path
) -> None:
    arguments = ("distill", "--pretrained_model_name_or_path", base, "--prompts", prompts, *SHORT)
    assert say(*arguments, "--output_dir", str(tmp_path / "one"))[0] == 0
    file = tmp_path / "one" / "config.json"
    again = str(tmp_path / "two")
    assert say("distill", "--config", str(file), "--output_dir", again)[0] == 0
    one, two = (Guide.from_pretrained(tmp_path / n / "guide") for n in ("one", "two"))
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert DistillConfig.load(file).prompts == prompts


@pytest.mark.parametrize("kind", ["full", "agd"])
def test_a_kind_of_guide_is_timed_fresh(
    kind: str, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--batch_sizes", "1", "--num_inference_steps", "2", "--rounds", "1")
    flags = ("--guide", kind, "--pretrained_model_name_or_path", base)
    assert cli.main(["benchmark", *flags, *short]) == 0
    assert f"{kind}: " in capsys.readouterr().out


def test_a_sweep_of_ones_own_base_draws_a_plot(
    base: str, clip: tuple[Any, Any], names: list[str], say: Say, tmp_path: Path
) -> None:
    for part in clip:
        part.save_pretrained(tmp_path / "judge")
    (tmp_path / "names.txt").write_text("\n".join(names))
    code, error = say(
        "sweep", "--hosts", base, "--judge", str(tmp_path / "judge"), "--samples", "2",
        "--prompts", str(tmp_path / "names.txt"), "--num_inference_steps", "2",
        "--guidance_scales", "1", "4", "--output", str(tmp_path / "out" / "it is.json"),
    )  # fmt: skip
    assert code == 0, error
    found = json.loads((tmp_path / "out" / "it is.json").read_text())
    assert list(found["hosts"]["base"]) == ["1", "4"]
    assert shlex.split(found["run"]["command"])[-1] == str(tmp_path / "out" / "it is.json")
    assert Image.open(tmp_path / "out" / "it is-base.png").width > 300


def test_a_comparison_writes_figures_and_a_plot_and_is_not_done_twice(
    base: str, clip: tuple[Any, Any], names: list[str], say: Say, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for part in clip:
        part.save_pretrained(tmp_path / "judge")
    (tmp_path / "names.txt").write_text("\n".join(names))
    flags = [
        "compare", "--quick", "--methods", "tiny", "guidance-interval", "--hosts", base,
        "--judge", str(tmp_path / "judge"), "--output_dir", str(tmp_path / "out"),
    ]  # fmt: skip
    for file in ("train_prompts", "prompts", "held_out_prompts"):
        flags += [f"--{file}", str(tmp_path / "names.txt")]
    code, error = say(*flags)
    assert code == 0, error
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(found["methods"]) == {"tiny", "guidance-interval"}
    assert Image.open(tmp_path / "out" / "pareto-samples.png").size[0] > 300
    monkeypatch.setattr("pilotfish.compare.comparison.distill", pytest.fail)
    assert say(*flags, "--output", str(tmp_path / "again.json"))[0] == 0
    assert json.loads((tmp_path / "again.json").read_text()) == found
    code, error = say(*flags, "--seed", "7")
    assert code == 1
    assert "other settings" in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--hosts", "fluent"), "fluent is a fine-tune; the first host is the base"),
        (("--methods", "telepathy"), "no method telepathy"),
        (("--guidance_scale", "1"), "no gain to keep"),
    ],
)
def test_a_comparison_that_cannot_be_says_why(
    flags: tuple[str, ...], sentence: str, say: Say, tmp_path: Path
) -> None:
    where = ("--output_dir", str(tmp_path / "out"))
    code, error = say("compare", "--quick", "--methods", "guidance-interval", *where, *flags)
    assert code in (1, 2)
    assert sentence in " ".join(error.split())
