"""The command line: a plain table, command -> module with a function ``main``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pilotfish.errors import Interrupted

COMMANDS = {
    "demo": ("all", "pilotfish.cli.demo", "distil a short guide and compare it: a page of images"),
    "sample": ("training", "pilotfish.cli.sample", "sample images guided, with CFG or without"),
    "app": ("app", "pilotfish.cli.app", "compare the guidance modes in a browser"),
    "distill": ("training", "pilotfish.cli.distill", "train a guide for a base model"),
    "distill-steps": ("training", "pilotfish.cli.distill_steps", "train guides for fewer steps"),
    "average": ("training", "pilotfish.cli.average", "average the weights of several guides"),
    "evaluate": ("evaluation", "pilotfish.cli.evaluate", "measure a guide on base and fine-tunes"),
    "inspect": ("evaluation", "pilotfish.cli.inspect", "show what a guide adds, step by step"),
    "card": ("evaluation", "pilotfish.cli.card", "write a guide's model card; upload both"),
    "compare": ("all", "baselines.command", "train and measure all methods on equal terms"),
    "benchmark": ("evaluation", "benchmarks.command", "time CFG, a single and a guided pass"),
}
"""Command -> the extra that it needs, its module, what it does."""

CLONE_ONLY = ("baselines", "benchmarks")
"""Packages beside the library in its repository."""

USAGE = "\n".join(
    [
        "usage: pilotfish COMMAND [--help] [options]",
        "",
        "Classifier-free guidance in one pass.",
        "",
        *(f"  {name:<14} {what}" for name, (_, _, what) in COMMANDS.items()),
        "",
        "compare and benchmark need a clone of the repository.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 after an error that the user can mend, which is printed as one sentence; 2 for an
        unknown command; 130 after an interruption.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack some of the characters
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"pilotfish: no command {name!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        command(name)(rest)
    except KeyboardInterrupt:
        print(f"pilotfish {name}: interrupted; what was saved is kept", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(f"pilotfish {name}: {_how_to_install(error, name)}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        print(f"pilotfish {name}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    return 0


def command(name: str) -> Callable[[Sequence[str]], None]:
    """The function of a command. Its module is imported here, so that the usage stays quick."""
    with _quiet_libraries():
        module = COMMANDS[name][1]
        if own_baselines() is None and module.startswith("baselines."):
            raise ModuleNotFoundError("no package baselines of a clone", name="baselines")
        run: Callable[[Sequence[str]], None] = import_module(module).main
    return run


def own_baselines() -> Any:
    """The package ``baselines`` of a clone, which registers its guides when it is imported; None
    where there is none. Another package of that name is not imported."""
    try:
        spec = find_spec("baselines")
    except ValueError:  # a module that was made by hand
        return None
    folders = (spec and spec.submodule_search_locations) or ()
    if not any((Path(folder) / "command.py").is_file() for folder in folders):
        return None
    module = import_module("baselines")
    return module if hasattr(module, "RULES") else None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without what diffusers and transformers log on import, and without their progress bars."""
    loggers: list[Any] = [
        import_module(f"{x}.utils.logging") for x in ("diffusers", "transformers")
    ]
    levels = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.disable_progress_bar()
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)


def _how_to_install(error: ModuleNotFoundError, command: str) -> str:
    """How to install a package that is missing.

    Raises:
        ModuleNotFoundError: it is one of the library itself.
    """
    missing = (error.name or "").partition(".")[0]
    if missing in ("", "pilotfish"):
        raise error
    if missing in CLONE_ONLY:
        return (
            f"this command is in the package {missing}, which is not installed with the library: "
            "clone the repository and run pip install -e . there"
        )
    extra = COMMANDS[command][0]
    return (
        f"{missing} is not installed: run pip install 'pilotfish[{extra}]', or in a clone "
        f"pip install -e '.[{extra}]'"
    )
