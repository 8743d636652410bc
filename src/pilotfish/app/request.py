"""What a visitor asks for, and what is refused. Anything may arrive here; nothing is trusted."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any


class RequestError(ValueError):
    """What is asked for cannot be drawn; the message says what would do."""


@dataclass(frozen=True)
class Limits:
    """What one visitor may take.

    Attributes:
        characters: of a prompt; what the text encoder reads is less.
        steps: sampling steps.
        scales: guidance scales of a strip, each of them two pictures.
        side: pixels of a picture's longer side, of a host.
        seed: the largest.
    """

    characters: int = 400
    steps: int = 100
    scales: int = 8
    side: int = 1024
    seed: int = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """One prompt and seed on one host. Values are as they came; :meth:`check` comes first."""

    host: str
    guide: str
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float = 4.0

    @classmethod
    def check(
        cls, limits: Limits, scales: tuple[float, float], *, host: str, guide: str, prompt: Any,
        negative_prompt: Any, seed: Any, num_inference_steps: Any, guidance_scale: Any,
    ) -> Request:  # fmt: skip
        """The request, if every value is in its bounds. An empty prompt is: it draws anything.

        Args:
            scales: the (low, high) of w.

        Raises:
            RequestError: naming the value and its bounds.
        """
        return cls(
            host,
            guide,
            text("the prompt", prompt, limits.characters),
            text("the negative prompt", negative_prompt, limits.characters),
            whole("the seed", seed, 0, limits.seed),
            whole("the number of steps", num_inference_steps, 1, limits.steps),
            number("the guidance scale w", guidance_scale, *scales),
        )


def text(what: str, value: Any, most: int) -> str:
    """A text on one line; None is empty.

    Raises:
        RequestError: it is no text, or longer than ``most`` characters.
    """
    if value is None:
        return ""
    if not isinstance(value, str) or any("\ud800" <= c <= "\udfff" for c in value):
        raise RequestError(f"{what} must be a text")  # half a character is none
    if len(value) > most:
        raise RequestError(f"{what} has {len(value):,} characters; at most {most} are read")
    return " ".join(value.split())


def number(what: str, value: Any, low: float, high: float) -> float:
    """A finite number in ``[low, high]``.

    Raises:
        RequestError: it is none.
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not abs(value) < math.inf:
        raise RequestError(f"{what} must be a number from {low:g} to {high:g}")
    if not low <= value <= high:
        most = sys.float_info.max  # which a whole number may be larger than
        near = max(min(value, most), -most)
        raise RequestError(f"{what} must be from {low:g} to {high:g}, not {near:g}")
    return float(value)


def whole(what: str, value: Any, low: int, high: int) -> int:
    """A whole number in ``[low, high]``; 3.0 is one.

    Raises:
        RequestError: it is none.
    """
    bounds = f"{what} must be a whole number from {low} to {high:,}"
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise RequestError(bounds)
    if not low <= value <= high:
        raise RequestError(f"{bounds}, not {value:,}")
    return int(value)


def scales(given: Any, limits: Limits, low: float, high: float) -> list[float]:
    """Guidance scales from a text such as ``1, 2.5, 4``, in rising order, none twice.

    Raises:
        RequestError: none, too many, or one that is out of bounds.
    """
    words = text("the list of w", given, limits.characters).replace(",", " ").split()
    found = set()
    for word in words:
        try:
            found.add(number("each w of the strip", float(word), low, high))
        except RequestError:
            raise
        except ValueError:
            raise RequestError(
                f"the list of w must be numbers such as 1, 2.5, 4; {word[:20]!r} is none"
            ) from None
    if not found or len(found) > limits.scales:
        raise RequestError(f"a strip takes from 1 to {limits.scales} different w, not {len(found)}")
    return sorted(found)
