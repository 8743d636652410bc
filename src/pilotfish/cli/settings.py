"""Settings of a training from flags and from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from pilotfish.guides import Guide
from pilotfish.training import presets
from pilotfish.training.config import ConfigError, DistillConfig, TrainingConfig

C = TypeVar("C", bound=TrainingConfig)


def parse(arguments: Sequence[str], kind: type[C], command: str, purpose: str) -> C:
    """Flags, over the values of a file given by ``--config``, over those of a ``--preset``, over
    the defaults. The flags of stage 1 include the settings of the chosen ``--guide_type``.

    Raises:
        ConfigError: a file cannot be read, there is no such preset, or a value is invalid.
        SystemExit: after the list of presets.
    """
    arguments = list(arguments)
    if "--list_presets" in arguments or "--list-presets" in arguments:
        print(presets.listed())
        raise SystemExit(0)
    given: dict[str, Any] = {}
    for name in _taken(arguments, "--preset")[-1:]:
        given |= presets.settings(name, kind)
    for file in _taken(arguments, "--config")[-1:]:
        given |= kind.read(Path(file))
    hints = get_type_hints(kind, include_extras=True)
    helps = _help_texts(kind)
    flags: list[Any] = []
    for f in fields(kind):
        hint: Any = Annotated[hints[f.name], tyro.conf.arg(help=helps.get(f.name, ""))]
        default = given.get(f.name, f.default)
        if kind is DistillConfig and f.name == "guide":
            name = (_values(arguments, "--guide_type") or [given.get("guide_type", "tiny")])[-1]
            if name not in Guide.registry:
                raise ConfigError(
                    f"guide_type must be one of {', '.join(Guide.registry)}, not {name!r}"
                )
            hint = Guide.registry[name].settings_class
            default = default if isinstance(default, hint) else hint()
        flags.append((f.name, hint, field() if default is MISSING else field(default=default)))
    # required fields first; tyro fills a plain dataclass, and the configuration validates
    flags.sort(key=lambda flag: flag[2].default is not MISSING)
    parsed: Any = tyro.cli(
        make_dataclass("Flags", flags, frozen=True), args=arguments, prog=f"pilotfish {command}",
        description=purpose + "--config FILE reads settings from TOML or JSON (such as a run's own "
        "config.json), --preset NAME those for a base and a card (--list_presets); flags override "
        "both.",
        use_underscores=True, config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    return kind(**vars(parsed))


def _help_texts(kind: type[Any]) -> dict[str, str]:
    """The docstring of each field, on one line."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):  # pydantic knows those of the class itself only
        for name, info in vars(cls).get("__pydantic_fields__", {}).items():
            if info.description:
                found[name] = " ".join(info.description.split())
    return found


def _taken(arguments: list[str], flag: str) -> list[str]:
    """The values that a flag is given, which are taken from the arguments."""
    found = _values(arguments, flag)
    for place in reversed([i for i, a in enumerate(arguments) if a.partition("=")[0] == flag]):
        del arguments[place : place + (1 if "=" in arguments[place] else 2)]
    return found


def _values(arguments: Sequence[str], flag: str) -> list[str]:
    """The values that a flag is given, as ``--flag value`` or ``--flag=value``."""
    found = []
    for i, argument in enumerate(arguments):
        name, joined, value = argument.partition("=")
        if name.replace("-", "_").lstrip("_") != flag.lstrip("-"):
            continue
        if not name.startswith("--"):
            continue
        if not joined and i + 1 == len(arguments):
            raise ConfigError(f"{flag} needs a value")
        found.append(value if joined else arguments[i + 1])
    return found
