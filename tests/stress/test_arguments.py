"""Anything as an argument: it is accepted, or refused with an error that says what is wrong."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from tests.stress.page import LONG

ACCEPTED, REFUSED = "accepted", "refused"
Record = Callable[[str, dict[str, float]], None]

texts = st.text(st.characters(categories=("L", "M", "N", "P", "S", "Z", "C")), max_size=40)
"""Every script, emoji, control characters, and halves of surrogate pairs."""
numbers = st.one_of(
    st.integers(), st.integers(-2, 2000), st.floats(), st.floats(0, 10),
    st.sampled_from((0, 1, -1, 2**23, 10**400, 1e308, 5e-324, -0.0)),
)  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Anything that Python's JSON reader accepts, NaN and Infinity included."""
prompts = st.one_of(
    texts,
    st.sampled_from(("", " ", "\0", "🦉" * 3, "\ud83e", "a " * 5000, "كلب", "猫", "a\nb\t\x1b")),
)
scales = st.one_of(st.floats(), st.floats(1, 8), st.integers(-10, 30), st.just(10**400))


def outcomes(
    strategy: st.SearchStrategy[Any], examples: int, call: Callable[[Any], str]
) -> Counter[str]:
    """How often each outcome came."""
    found: Counter[str] = Counter()

    @settings(
        max_examples=300 if LONG else examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def once(example: Any) -> None:
        found[call(example)] += 1

    once()
    return found


def setting_files(config_class: Any) -> st.SearchStrategy[bytes]:
    """Files of settings: any fields with any values, any text, any bytes."""
    names = [f.name for f in fields(config_class)]
    rest = {name: values for name in names if name != "output"}
    complete = st.fixed_dictionaries({"output": texts}, optional=rest).map(json.dumps)
    one = st.tuples(st.sampled_from(names), values).map(
        lambda field: json.dumps({"output": "runs", field[0]: field[1]})
    )
    return st.one_of(one, complete, values.map(json.dumps)).map(str.encode) | st.binary(max_size=60)


@pytest.mark.parametrize("config_class", [DistillConfig, StepsConfig])
def test_any_file_is_settings_or_a_config_error(
    config_class: Any, tmp_path: Path, record: Record
) -> None:
    path = tmp_path / "settings.json"

    def load(content: bytes) -> str:
        path.write_bytes(content)
        try:
            config = config_class.load(path)
        except ConfigError as error:
            return REFUSED if str(path) in str(error) else "does not name the file"
        config.save(path)
        assert config_class.load(path) == config
        return ACCEPTED

    found = outcomes(setting_files(config_class), 150, load)
    assert set(found) == {ACCEPTED, REFUSED}
    record(f"settings, {config_class.__name__}", dict(found))


@pytest.mark.parametrize("text", ['{"output": "a\\u0000"}', "[" * 100_000, "\xff"])
def test_an_unreadable_file_of_settings_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        DistillConfig.load(path)
    assert str(path) in str(caught.value)


def guided_calls(
    pipe: Any, guide: Guide, examples: int, *, prompts: st.SearchStrategy[Any] | None = None,
    scales: st.SearchStrategy[Any] | None = None, sides: st.SearchStrategy[Any] | None = None,
) -> Counter[str]:  # fmt: skip
    """Calls of a guided pipeline with any prompt and negative prompt, scale and latent size. The
    latents are finite, or the call is refused. The plain pipeline refuses the same prompts and
    sizes."""
    channels = pipe.unet.config.in_channels
    prompts = st.just("cat") if prompts is None else prompts
    calls = st.tuples(
        prompts, prompts, st.just(4.0) if scales is None else scales,
        st.just((8, 8)) if sides is None else sides,
    )  # fmt: skip

    def draw(prompt: str, negative: str, scale: Any, side: tuple[int, int]) -> Any:
        latents = torch.randn(1, channels, *side, generator=torch.Generator().manual_seed(0))
        size = {"height": pipe.vae_scale_factor * side[0], "width": pipe.vae_scale_factor * side[1]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipe(
                prompt, negative_prompt=negative, guidance_scale=scale, num_inference_steps=2,
                latents=latents, output_type="latent", **size,
            ).images  # fmt: skip

    def call(arguments: tuple[str, str, Any, tuple[int, int]]) -> str:
        prompt, negative, scale, side = arguments
        try:
            expected, refusal = draw(prompt, negative, 4.0, side).shape, None
        except (TypeError, ValueError) as error:
            expected, refusal = None, type(error)
        with guide.attached(pipe):
            try:
                made = draw(prompt, negative, scale, side)
            except GuideError as error:
                return REFUSED if "guidance_scale" in str(error) else f"{error!r}"
            except (TypeError, ValueError) as error:
                return REFUSED if type(error) is refusal else f"{error!r}"
        assert refusal is None
        assert made.shape == expected
        assert made.isfinite().all(), arguments
        return ACCEPTED

    return outcomes(calls, examples, call)


def test_any_guidance_scale_gives_finite_latents_or_an_error(
    model: Any, guide: Guide, record: Record
) -> None:
    found = guided_calls(model, guide, 30, scales=scales)
    assert set(found) == {ACCEPTED, REFUSED}
    record("guidance scales", dict(found))


def test_any_prompt_is_accepted_as_by_the_plain_pipeline(
    model: Any, guide: Guide, record: Record
) -> None:
    found = guided_calls(model, guide, 30, prompts=prompts)
    assert set(found) == {ACCEPTED, REFUSED}
    record("prompts", dict(found))


def test_any_size_is_accepted_as_by_the_plain_pipeline(
    model: Any, guide: Guide, record: Record
) -> None:
    unit = max(8 // model.vae_scale_factor, 1)
    fitting = st.integers(1, 9).map(lambda n: n * unit)
    sides = st.tuples(fitting, fitting) | st.tuples(st.integers(1, 13), st.integers(1, 13))
    found = guided_calls(model, guide, 30, sides=sides)
    assert set(found) <= {ACCEPTED, REFUSED}
    assert found[ACCEPTED] > 0
    record("latent sizes", dict(found))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 10**400, 1e300])
def test_a_scale_that_is_not_finite_is_refused(
    model: Any, guide: Guide, draw: Any, scale: float
) -> None:
    with guide.attached(model), pytest.raises(GuideError, match="must be a finite number"):
        draw(model, guidance_scale=scale)


@pytest.mark.filterwarnings("ignore:guidance_scale")
def test_a_scale_at_which_the_prediction_overflows_is_refused(
    model: Any, guide: Guide, draw: Any
) -> None:
    with guide.attached(model):
        expected = draw(model)
        with pytest.raises(GuideError, match=r"3e\+38 is too far from \[1, 8\]"):
            draw(model, guidance_scale=3e38)
        assert draw(model).equal(expected)


@pytest.mark.skipif(LONG, reason="checks the check")
def test_a_guide_that_is_not_finite_fails_the_check(model: Any, guide: Guide) -> None:
    for parameter in guide.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(AssertionError):
        guided_calls(model, guide, 1)
