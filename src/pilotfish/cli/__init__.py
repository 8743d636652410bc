"""The command line: a plain table, command -> function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from safetensors import SafetensorError

COMMANDS = {
    "demo": "distil a guide in minutes, plug it in, write a report with pictures",
    "distill": "train a guide for a base pipeline",
    "distill-steps": "teach a guide to do with half the steps, round after round",
    "average": "make one guide of several: the mean of their weights",
    "app": "draw in a browser: no guidance, CFG and guided side by side",
    "sample": "make pictures with a guide (or with CFG, or with no guidance)",
    "evaluate": "measure a guide on a base and its fine-tunes",
    "compare": "train and measure every method that does without the second pass",
    "steps": "measure quality against the number of sampling steps",
    "negatives": "measure whether negative prompts still do what they do under CFG",
    "sweep": "measure what CFG alone does, by guidance scale",
    "scales": "draw the same seeds at several guidance scales, CFG above guided",
    "inspect": "show what a guide adds, and where, from noise to picture",
    "card": "write a model card beside a guide",
    "push": "put a guide and its card on the Hugging Face hub",
    "benchmark": "time CFG, a plain pass and a guided pass side by side",
}

USAGE = "\n".join(
    [
        "usage: pilotfish COMMAND [--help] [options]",
        "",
        "Classifier-free guidance in one pass.",
        "",
        *(f"  {name:<14} {what}" for name, what in COMMANDS.items()),
    ]
)


def command(name: str) -> Callable[[Sequence[str]], None]:
    """The function of a command, imported only when it is asked for: help stays quick."""
    # libraries below have much to say on loading that a user can do nothing about
    chatter = [import_module(f"{x}.utils.logging") for x in ("diffusers", "transformers")]
    levels = [logging.get_verbosity() for logging in chatter]
    for logging in chatter:
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # what they have to say on being imported, no user can mend
    import_module("baselines")  # so that every command can read their guides
    beside = {"compare": "baselines.command", "benchmark": "benchmarks.command"}
    module = import_module(beside.get(name, "pilotfish.cli." + name.replace("-", "_")))
    for logging, level in zip(chatter, levels, strict=True):
        logging.set_verbosity(level)
    run: Callable[[Sequence[str]], None] = module.main
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
        from pilotfish.training.loop import Interrupted

        print(f"pilotfish {name}: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    return 0
