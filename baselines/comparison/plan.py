"""What is compared with what, on equal terms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from baselines.comparison.methods import METHODS
from pilotfish.training.config import ConfigError


@dataclass(frozen=True)
class Plan:
    """Which methods, and what each of them gets."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Names of methods; ``pilotfish compare --help`` lists them all."""
    max_train_steps: int = 200
    """Training steps of every method: all see equally many samples."""
    equal_seconds: bool = True
    """Train each a second time, for as many seconds as the default took."""
    train_batch_size: int = 64
    seeds: tuple[int, ...] = (0,)
    """Of the training; with several, tables show means."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Of the training."""
    gradient_checkpointing: bool = False
    """In the training: less memory for more time."""
    samples: int = 200
    """Pictures for each method and host."""
    held_out: int = 64
    """Prompts of the guidance error."""
    guidance_scale: float = 4.0
    """w of the pictures, and the one scale of the methods that learn one."""
    num_inference_steps: int = 25
    rounds: int = 3
    """Rounds of the side-by-side timing."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ConfigError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
        if not self.methods or not self.seeds:
            raise ConfigError("a comparison needs at least one method and one seed")
        for name in ("max_train_steps", "rounds", "held_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    def facts(self) -> dict[str, str]:
        """The settings on which every figure depends; the choice of methods is none of them."""
        free = ("methods", "equal_seconds", "seeds", "rounds", "gradient_checkpointing")
        return {f.name: str(getattr(self, f.name)) for f in fields(Plan) if f.name not in free}
