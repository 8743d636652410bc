"""Frozen dataclasses whose values are validated, and what is wrong with a value in words."""

from __future__ import annotations

from functools import wraps
from reprlib import Repr
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

RULES = ConfigDict(
    strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
)  # fmt: skip

WORDS = {
    "greater than or equal to": "at least", "greater than": "above",
    "less than or equal to": "at most", "less than": "below", "tuple": "list",
}  # fmt: skip

C = TypeVar("C", bound=type[Any])


class ConfigError(ValueError):
    """A setting is unknown or invalid; the message names it."""


def first_error(error: ValidationError) -> str:
    """The first error of a validation as one sentence that names the field."""
    errors = error.errors(include_url=False)
    unknown = [str(e["loc"][-1]) for e in errors if e["type"] == "unexpected_keyword_argument"]
    if unknown:
        return f"unknown settings: {', '.join(sorted(unknown))}"
    first = errors[0]
    name = "".join(f"[{part}]" if isinstance(part, int) else part for part in first["loc"])
    if first["type"] in ("missing", "missing_argument"):
        return f"{name} is required"
    if isinstance(own := first.get("ctx", {}).get("error"), ConfigError):
        return str(own)
    short = Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    words = first["msg"].removeprefix("Value error, ").replace("Input should", "must")
    for long, brief in WORDS.items():
        words = words.replace(long, brief)
    return f"{name} {words}, not {short.repr(first['input'])}"


@dataclass_transform(frozen_default=True)
def config_dataclass(cls: C) -> C:
    """A frozen pydantic dataclass that raises :class:`ConfigError` for an invalid value."""
    made: Any = pydantic_dataclass(cls, frozen=True, config=RULES)
    validate = made.__init__

    @wraps(validate)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            validate(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(first_error(error)) from error

    made.__init__ = init
    checked: C = made
    return checked


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    return text


Text = Annotated[str, AfterValidator(_without_nul)]
Probability = Annotated[float, Field(ge=0, le=1)]
Resolution = Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")]
"""WIDTHxHEIGHT in pixels."""
Quantization = Literal["no", "fp8", "int8", "nf4", "int8-torchao"]
