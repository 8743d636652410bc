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
if importlib.util.find_spec("torchvision") is None:  # ComfyUI needs it for other models
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
importlib.import_module("comfy.sd")
for name in [n for n, found in sys.modules.items() if isinstance(found, MagicMock)]:
    del sys.modules[name]
