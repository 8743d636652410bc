"""A ComfyUI tree, as COMFYUI_PATH names it. Without one these tests fail; they never skip."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest

if not os.environ.get("COMFYUI_PATH"):
    raise pytest.UsageError(
        "set COMFYUI_PATH to a ComfyUI tree; after it, separated by a colon, folders with what it "
        "imports and this environment lacks (see comfyui/README.md)"
    )
sys.path[:0] = os.environ["COMFYUI_PATH"].split(os.pathsep)
for name in ("transformers", "diffusers"):  # these ask for torchvision as well, and must not find
    importlib.import_module(name)  # what stands in for it below
importlib.import_module("comfy.options").enable_args_parsing(False)
importlib.import_module("comfy.cli_args").args.cpu = True
USED = {  # by parts of ComfyUI that no test runs
    "torchvision": ("transforms",),
    "av": ("container", "subtitles", "subtitles.stream"),
}
for package, modules in USED.items():
    if importlib.util.find_spec(package) is None:
        for name in (package, *(f"{package}.{module}" for module in modules)):
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
for name in ("comfy.sd", "nodes"):
    importlib.import_module(name)
for name in [name for name, found in sys.modules.items() if isinstance(found, MagicMock)]:
    del sys.modules[name]


def pytest_make_parametrize_id(val: object) -> str | None:
    """A kind of denoiser is called by its name."""
    return getattr(val, "name", None)
