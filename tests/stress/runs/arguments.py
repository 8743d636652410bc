"""Anything as an argument: settings files, guidance scales, prompts, sizes of pictures.

Each trial gives an outcome, ``taken`` or ``refused``, the latter in words; anything else is an
error of the library.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.stress.runs.result import Progress, require
from pilotfish.interface import GuideError
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig, TrainingConfig
from pilotfish.guides import Guide

TAKEN, REFUSED = "taken", "refused"

texts = st.text(st.characters(categories=("L", "M", "N", "P", "S", "Z", "C")), max_size=40)
"""Every script, emoji and control character, and halves of surrogate pairs."""
numbers = st.one_of(
    st.integers(), st.integers(-2, 2000), st.floats(), st.floats(0, 10),
    st.sampled_from((0, 1, -1, 2**23, 10**400, 1e308, 5e-324, -0.0)),
)  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
"""Whatever JSON can say, with what Python's reader takes beside it (NaN, Infinity)."""
prompts = st.one_of(
    texts,
    st.sampled_from(("", " ", "\0", "🦉" * 3, "\ud83e", "a " * 5000, "كلب", "猫", "a\nb\t\x1b")),
)
scales = st.one_of(st.floats(), st.floats(1, 8), st.integers(-10, 30), st.just(10**400))
CAT, FOUR, SQUARE = st.just("cat"), st.just(4.0), st.just((8, 8))


@dataclass(frozen=True)
class Trial:
    """Something that is given anything.

    Attributes:
        anything: what it is given.
        outcome: does it, and says ``taken`` or ``refused``.
    """

    anything: st.SearchStrategy[Any]
    outcome: Callable[[Any], str]


def tried(trial: Trial, examples: int, name: str, progress: Progress) -> Counter[str]:
    """How often each outcome came, of so many examples."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(trial.anything)
    def once(something: Any) -> None:
        outcomes[trial.outcome(something)] += 1
        progress(name, min(outcomes.total(), examples), examples)

    once()
    return outcomes


def setting_files(kind: type[TrainingConfig], folder: Path) -> Trial:
    """Files of settings: of any fields with any value, or any text, or any bytes."""
    some = {f.name: values for f in fields(kind)}
    rest = {name: value for name, value in some.items() if name != "output"}
    nearly = st.fixed_dictionaries({"output": texts}, optional=rest).map(json.dumps)
    few = st.sampled_from(sorted(some)).flatmap(
        lambda name: st.builds(lambda v: json.dumps({"output": "runs", name: v}), values)
    )
    contents = st.one_of(few, nearly, values.map(json.dumps)).map(str.encode) | st.binary(
        max_size=60
    )

    def outcome(content: bytes) -> str:
        path = folder / "settings.json"
        path.write_bytes(content)
        try:
            config = kind.load(path)
        except ConfigError as error:
            require(str(path) in str(error), f"{error!r} does not name its file")
            return REFUSED
        config.save(path)
        require(kind.load(path) == config, f"settings came back otherwise: {content!r}")
        return TAKEN

    return Trial(contents, outcome)


def guided_calls(
    pipe: Any, guide: Guide, *, prompts: st.SearchStrategy[Any] = CAT,
    scales: st.SearchStrategy[Any] = FOUR, sides: st.SearchStrategy[Any] = SQUARE,
) -> Trial:  # fmt: skip
    """Calls of a pipeline with a guide, of which prompt and negative prompt, scale and size of
    the latents may be anything: the result is finite, or refused in words. What the plain
    pipeline refuses, the guided one refuses as well, and nothing else but scales."""
    channels = pipe.unet.config.in_channels

    def draw(prompt: str, negative: str, scale: Any, side: tuple[int, int]) -> Any:
        latents = torch.randn(1, channels, *side, generator=torch.Generator().manual_seed(0))
        size = {"height": pipe.vae_scale_factor * side[0], "width": pipe.vae_scale_factor * side[1]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipe(
                prompt, negative_prompt=negative, guidance_scale=scale, num_inference_steps=2,
                latents=latents, output_type="latent", **size,
            ).images  # fmt: skip

    def outcome(call: tuple[str, str, Any, tuple[int, int]]) -> str:
        prompt, negative, scale, side = call
        try:
            expected = draw(prompt, negative, 4.0, side).shape
        except (TypeError, ValueError) as error:
            plainly: Any = type(error)
        else:
            plainly = None
        with guide.attached(pipe):
            try:
                made = draw(prompt, negative, scale, side)
            except GuideError as error:
                require("guidance_scale" in str(error), f"{error!r} names nothing")
                return REFUSED
            except (TypeError, ValueError) as error:
                require(type(error) is plainly, f"{error!r}, which the plain pipeline takes")
                return REFUSED
        require(plainly is None, f"{call!r} is taken, though the plain pipeline refuses it")
        require(made.shape == expected, f"{call!r} gives {list(made.shape)}")
        require(bool(made.isfinite().all()), f"{call!r} gives what is not finite")
        return TAKEN

    return Trial(st.tuples(prompts, prompts, scales, sides), outcome)


def any_sides(pipe: Any) -> st.SearchStrategy[tuple[int, int]]:
    """Heights and widths of latents, most of them such as the pipeline takes."""
    unit = max(8 // pipe.vae_scale_factor, 1)
    taken = st.integers(1, 9).map(lambda n: n * unit)
    return st.tuples(taken, taken) | st.tuples(st.integers(1, 13), st.integers(1, 13))


def all_trials(pipe: Any, guide: Guide, folder: Path) -> dict[str, Trial]:
    """By name."""
    return {
        "settings of stage 1": setting_files(DistillConfig, folder),
        "settings of stage 2": setting_files(StepsConfig, folder),
        "guidance scales": guided_calls(pipe, guide, scales=scales),
        "prompts": guided_calls(pipe, guide, prompts=prompts),
        "sizes": guided_calls(pipe, guide, sides=any_sides(pipe)),
    }


def anything(pipe: Any, guide: Guide, examples: int, progress: Progress) -> dict[str, Counter[str]]:
    """All trials.

    Raises:
        EnduranceError, or whatever the library raised: it did not hold.
    """
    with TemporaryDirectory() as folder:
        trials = all_trials(pipe, guide, Path(folder))
        return {name: tried(t, examples, name, progress) for name, t in trials.items()}
