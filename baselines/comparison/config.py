"""Which methods are compared, with which budget, and how they are measured."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from baselines import RULES
from pilotfish.guides import Guide
from pilotfish.training.config import ConfigError

DEFAULT = "tiny"
"""The library's default guide."""
TITLES = {
    "tiny": "Pilotfish, tiny", "external": "Plug-and-Play, tiny", "full": "Plug-and-Play, full",
}  # fmt: skip
"""Titles of the library's own guides."""
FREE = ("methods", "equal_seconds", "seeds", "rounds", "gradient_checkpointing", "batch_size")
"""Settings that a comparison may change when it is resumed."""


def titles() -> dict[str, str]:
    """The titles of all methods by name: guide types and rules, the default first."""
    found = {DEFAULT: TITLES[DEFAULT]}
    for name, method in (Guide.registry | RULES).items():
        found.setdefault(name, getattr(method, "title", TITLES.get(name, name)))
    return found


@dataclass(frozen=True)
class ComparisonConfig:
    """Which methods are compared, and the budget and measurement of each."""

    methods: tuple[str, ...] = field(default_factory=lambda: tuple(titles()))
    """Names of methods. Default: all."""
    max_train_steps: int = 200
    """Training steps of every method, so that all see as many samples."""
    long_train_steps: int = 0
    """Train each once more, with the first seed, for so many steps; 0: not."""
    learning_rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Factors on each method's own learning rate. Each is trained for ``rate_train_steps``; the
    one with the least guidance error on the base is used for all trainings of the method. A rate
    at which training diverges is left out. A single factor is used as it is."""
    rate_train_steps: int = 60
    """Training steps with each learning rate."""
    equal_seconds: bool = True
    """Train each a second time, for as many seconds as the default took."""
    train_batch_size: int = 64
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training; with several, tables show means."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the training."""
    gradient_checkpointing: bool = False
    """In the training: less memory for more time."""
    samples: int = 200
    """Images for each method and model."""
    validation_samples: int = 64
    """Prompts for the guidance error."""
    guidance_scale: float = 4.0
    """w of the images, and the training scale of methods that learn a single one."""
    num_inference_steps: int = 25
    seed: int = 0
    """Of the first image; the others follow."""
    batch_size: int = 32
    """Of the images, in each process."""
    rounds: int = 3
    """Rounds of the side-by-side timing."""

    def __post_init__(self) -> None:
        known = titles()
        if unknown := sorted(set(self.methods) - set(known)):
            raise ConfigError(
                f"unknown methods: {', '.join(unknown)}; available: {', '.join(known)}"
            )
        if not self.methods or not self.seeds:
            raise ConfigError("a comparison needs at least one method and one seed")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f"learning_rates must be above 0, not {self.learning_rates}")
        for name, least in (
            ("max_train_steps", 1), ("rate_train_steps", 1), ("rounds", 1), ("samples", 2),
            ("validation_samples", 1), ("num_inference_steps", 1), ("batch_size", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not self.guidance_scale > 1:
            raise ConfigError(
                f"guidance_scale must be above 1, where CFG differs from no guidance, not "
                f"{self.guidance_scale:g}"
            )

    def fixed(self) -> dict[str, str]:
        """The settings that all figures depend on."""
        names = (f.name for f in fields(ComparisonConfig) if f.name not in FREE)
        return {name: str(getattr(self, name)) for name in names}
