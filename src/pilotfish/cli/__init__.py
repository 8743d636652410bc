"""The command line: a plain table, command -> function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from safetensors import SafetensorError

COMMANDS = {
    "demo": "distil a guide in minutes, plug it in, write a report with pictures",
    "distill": "train a guide for a base pipeline",
    "sample": "make pictures with a guide (or with CFG, or with no guidance)",
    "evaluate": "measure a guide on a base and its fine-tunes",
    "sweep": "measure what CFG alone does, by guidance scale",
    "benchmark": "time CFG, a plain pass and a guided pass side by side",
}

USAGE = "\n".join(
    [
        "usage: pilotfish COMMAND [--help] [options]",
        "",
        "Classifier-free guidance in one pass.",
        "",
        *(f"  {name:<10} {what}" for name, what in COMMANDS.items()),
    ]
)


def command(name: str) -> Callable[[Sequence[str]], None]:
    """The function of a command, imported only when it is asked for: help stays quick."""
    run: Callable[[Sequence[str]], None] = import_module(f"pilotfish.cli.{name}").main
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. What a person can mend is said in one sentence, with exit code 1."""
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
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        from pilotfish.distill.loop import Interrupted

        print(f"pilotfish {name}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    return 0
