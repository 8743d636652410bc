"""The package itself: what it imports, and what it needs to be installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pilotfish
from pilotfish import TinyGuide, cli

ROOT = Path(__file__).parents[1]
HEAVY = "torch", "diffusers", "transformers"


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a Python of its own, from the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=300,
    )  # fmt: skip


# --- imports -----------------------------------------------------------------------------------


def test_the_usage_needs_no_heavy_library() -> None:
    done = run(
        "import sys\nfrom pilotfish.cli import main\n"
        "for arguments in [], ['--help'], ['fly']: main(arguments)\nprint('|', *sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert not {*HEAVY} & {*done.stdout.rpartition("|")[2].split()}


def test_every_public_name_is_there() -> None:
    for name in pilotfish.__all__:
        assert getattr(pilotfish, name) is not None
        assert name in dir(pilotfish)
    with pytest.raises(AttributeError, match="no attribute 'Giude'"):
        pilotfish.Giude  # type: ignore[attr-defined]  # noqa: B018


def test_the_version_stands_in_one_place() -> None:
    models = (ROOT / "assets" / "pilotfish_models" / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{pilotfish.__version__}"' in models
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {pilotfish.__version__}" in citation
    nodes = tomllib.loads((ROOT / "comfyui" / "pyproject.toml").read_text(encoding="utf-8"))
    assert nodes["project"]["version"] == pilotfish.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == pilotfish.__version__
    for file in (ROOT / "pyproject.toml", ROOT / "assets" / "pyproject.toml"):
        assert "version" in tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dynamic"]


def test_hooks_run_what_make_check_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in ("ruff check", "ruff format --check", "mypy", "lint-imports"):
        assert f"entry: .venv/bin/{command}" in hooks
        assert f"\t$(BIN)/{command}" in makefile


def test_the_library_is_small() -> None:
    files = (p for p in Path(pilotfish.__file__).parent.rglob("*") if "__pycache__" not in p.parts)
    assert sum(p.stat().st_size for p in files if p.is_file()) < 2e6


# --- core dependencies -------------------------------------------------------------------------

HIDE = """
import sys

class Hiding:  # a finder that finds all but some packages, as if those were not installed
    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.hidden:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

hidden = set(sys.argv[1].split(","))
sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
"""


def with_all_they_need(*names: str) -> set[str]:
    """Distributions, and those that they depend on, directly or not."""
    found: set[str] = set()
    left = [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            needs = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:  # for another platform, or optional
            continue
        found.add(name)
        left += [
            canonicalize_name(need.name)
            for need in needs
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return found


@cache
def brought_by(extra: str | None) -> set[str]:
    """The distributions that are installed with the library and one of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = with_all_they_need(*(Requirement(line).name for line in project["dependencies"]))
    for line in project["optional-dependencies"][extra] if extra else ():
        needed = Requirement(line)
        if needed.name == "pilotfish":
            found |= {name for other in needed.extras for name in brought_by(other)}
        else:
            found |= with_all_they_need(needed.name)
    return found


def hidden_without(extra: str | None) -> set[str]:
    """The packages in this environment that would be missing, by the name of their import."""
    found = brought_by(extra)
    return {"pilotfish_models"} | {
        package
        for package, distributions in packages_distributions().items()
        if not found & {canonicalize_name(name) for name in distributions}
        and package != "pilotfish"
    }


CORE = """
import importlib, pkgutil, sys
from diffusers import StableDiffusionPipeline
import pilotfish
from pilotfish import Guide, TinyGuide, bundled

for room in ("backbones", "guides", "pipelines"):
    package = importlib.import_module(f"pilotfish.{room}")
    for module in pkgutil.walk_packages(package.__path__, f"pilotfish.{room}."):
        importlib.import_module(module.name)

folder = sys.argv[2]
pipe = StableDiffusionPipeline.from_pretrained(folder + "/pipe", local_files_only=True)
guide = Guide.from_pretrained(folder + "/guide")
guide.attach(pipe)
batches = []
pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
pipe("cat", guidance_scale=4.0, num_inference_steps=2)
guide.detach(pipe)
pipe("cat", guidance_scale=4.0, num_inference_steps=2)
assert batches == [1, 1, 2, 2], batches

assert not bundled.installed() and bundled.guide_names() == []
try:
    bundled.load_model()
except RuntimeError as error:
    print(error)
"""


def test_core_dependencies_suffice_to_load_attach_and_sample(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    TinyGuide.for_denoiser(pipe.unet, "epsilon").save_pretrained(tmp_path / "guide")
    hidden = hidden_without(None)
    assert {"gradio", "matplotlib", "scipy", "tyro"} <= hidden
    done = run(HIDE + CORE, ",".join(hidden), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "the bundled models are not installed: run pip install pilotfish-models, or in a clone "
        "pip install ./assets, or name a model of your own\n"
    )


# Processes with the same packages each, forked where the core dependencies have been imported
COMMANDS = """
import contextlib, importlib, io, json, os, traceback
import diffusers, peft, torch, transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pilotfish import cli

def end(command):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main([command, "--help"])
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        code = repr(error)
    return code, said.getvalue()

def forked(call):
    reads, writes = os.pipe()
    if not os.fork():
        try:
            with open(writes, "w") as file:
                file.write(json.dumps(call()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads) as file:
        return json.load(file)

def among(packages, commands):
    hidden.clear()
    hidden.update(packages)
    return [end(command) for command in commands]

def loaded(packages, modules):
    hidden.clear()
    hidden.update(packages)
    for module in modules:
        importlib.import_module(module)
    return sorted(sys.modules)

groups, modules = json.loads(sys.argv[2])
ended = [forked(lambda: among(*group)) for group in groups]
print(json.dumps([ended, forked(lambda: loaded(*modules))]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_command_needs_its_extra_and_no_other() -> None:
    """And ``sample`` and ``app`` nothing of training and evaluation."""
    extras = {name: extra for name, (extra, *_) in cli.COMMANDS.items()}
    groups = {None: [*extras]} | {
        extra: [name for name in extras if extras[name] == extra] for extra in extras.values()
    }
    hidden = {extra: hidden_without(extra) for extra in groups}
    drawing = ("pilotfish.cli.sample", "pilotfish.cli.app", "pilotfish.app.session")
    tried = [
        [(sorted(hidden[extra]), names) for extra, names in groups.items()],
        (sorted(hidden["training"] & hidden["app"]), drawing),
    ]
    done = run(HIDE + COMMANDS, ",".join(hidden[None]), json.dumps(tried))
    assert done.returncode == 0, done.stderr
    ended, loaded = json.loads(done.stdout)
    wrong = []
    for (extra, names), results in zip(groups.items(), ended, strict=True):
        for name, (code, said) in zip(names, results, strict=True):
            how = f"is not installed: run pip install 'pilotfish[{extras[name]}]'"
            if extra is None:
                fits = code == 1 and len(said.splitlines()) == 1 and how in said
            else:
                fits = code == 0
            if not fits:
                wrong.append((name, extra, code, said))
    assert not wrong
    assert set(loaded) >= {*drawing}
    others = ("pilotfish.training", "pilotfish.evaluation", "torchmetrics", "tensorboard")
    assert [name for name in loaded if name.startswith(others)] == []
