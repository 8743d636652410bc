"""What is asked for: within its bounds or refused in words, whatever arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.app import request
from pilotfish.app.request import Limits, RequestError

LIMITS = Limits()
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


def answer(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What came of it: a value, or the refusal."""
    try:
        return ask(*arguments)
    except RequestError as refusal:
        return refusal


@given(ANYTHING)
def test_a_value_is_in_its_bounds_or_refused(value: Any) -> None:
    w = answer(request.number, "w", value, 1, 8)
    assert "from 1 to 8" in str(w) if isinstance(w, RequestError) else 1 <= w <= 8
    seed = answer(request.whole, "the seed", value, 0, LIMITS.seed)
    if isinstance(seed, RequestError):
        assert "a whole number from 0 to 4,294,967,295" in str(seed)
    else:
        assert type(seed) is int
        assert 0 <= seed <= LIMITS.seed
    text = answer(request.text, "the prompt", value, 40)
    assert "the prompt" in str(text) if isinstance(text, RequestError) else len(text) <= 40


@given(ANYTHING)
def test_a_list_of_scales_is_in_its_bounds_or_refused(value: Any) -> None:
    found = answer(request.scales, value, LIMITS, 1, 8)
    if isinstance(found, list):
        assert 1 <= len(found) <= LIMITS.scales
        assert found == sorted(set(found))
        assert all(1 <= w <= 8 for w in found)
    else:
        assert isinstance(found, RequestError)
        assert "\n" not in str(found)


def test_scales_are_read_as_people_write_them() -> None:
    assert request.scales(" 4,2.5 1,, 4 ", LIMITS, 1, 8) == [1, 2.5, 4]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "from 1 to 8 different w, not 0"),
        ("1 2 3 4 5 6 7 8 1.5", "from 1 to 8 different w, not 9"),
        ("1, many", "'many' is none"),
        ("nan", "a number from 1 to 8"),
        ("inf", "a number from 1 to 8"),
        ("9", "from 1 to 8, not 9"),
        ("1" * 401, "401 characters"),
    ],
)
def test_scales_that_cannot_be_say_why(text: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        request.scales(text, LIMITS, 1, 8)
