"""What the rebuild must not change: guidance error and images of the bundled guides.

``python -m tests.net.measure`` prints the record as JSON; ``--write`` keeps it in
``tests/net/record.json`` and the images in ``tests/net/images.npz``.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pilotfish import bundled
from pilotfish.evaluation.results import machine
from pilotfish.evaluation.speed import measure_cost
from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.pipelines.sampling import sample

HERE = Path(__file__).parent
MODELS = ("base", "fluent", "twemoji", "emojione")
PROMPT, NEGATIVE, SEED, STEPS, W = "owl", "red apple", 0, 25, 4.0
MODES = ("none", "cfg", "guided", "guided, negative prompt")
FEW = {"tiny-16": 16, "tiny-8": 8, "tiny-4": 4}


def errors(name: str) -> dict[str, float]:
    """Guidance error by w on 16 held-out prompts, and at w = 4 with negative prompts."""
    pipe, guide = bundled.load_model(name), bundled.load_guide()
    prompts = bundled.prompts("held_out")[:16]

    def error(**settings: Any) -> dict[str, float]:
        trajectories = Trajectories.of_pipeline(
            pipe, prompts, num_inference_steps=STEPS, seed=SEED, **settings
        )
        return pipeline_guidance_error(pipe, guide, trajectories).by_w

    told = error(guidance_scales=(W,), negative_prompts=[*prompts[8:], *prompts[:8]])
    return {**error(), "4, negative prompt": told["4"]}


def image(pipe: Any, mode: str, guide: Any, steps: int = STEPS) -> np.ndarray:
    """(H, W, 3) uint8."""
    drawn = sample(
        pipe, [PROMPT], seeds=[SEED], guidance_scale=1.0 if mode == "none" else W,
        num_inference_steps=steps, guide=guide if mode.startswith("guided") else None,
        negative_prompts=[NEGATIVE] if "negative" in mode else None,
    )  # fmt: skip
    pixels = (next(iter(drawn)).image.permute(1, 2, 0) + 1) * 127.5
    return pixels.round().to(torch.uint8).numpy()


def images() -> dict[str, np.ndarray]:
    """By model and mode; of the guides for few steps, on the base."""
    found = {}
    for name in MODELS:
        pipe, guide = bundled.load_model(name), bundled.load_guide()
        found |= {f"{name}, {mode}": image(pipe, mode, guide) for mode in MODES}
    pipe = bundled.load_model("base")
    for name, steps in FEW.items():
        found[f"base, {name}"] = image(pipe, "guided", bundled.load_guide(name), steps)
    return found


def digest(pixels: np.ndarray) -> str:
    return sha256(pixels.tobytes()).hexdigest()


def ratios() -> dict[str, Any]:
    """Cost ratios of one run; to be made on a quiet machine."""
    measured = measure_cost(bundled.load_model("base"), bundled.load_guide(), rounds=15)
    return {
        "cfg_over_guided": measured.cfg_over_guided,
        "cfg_over_plain": measured.cfg_over_none,
    }


def main() -> None:
    made = images()
    record = {
        "guidance_error": {name: errors(name) for name in MODELS},
        "images": {name: digest(pixels) for name, pixels in made.items()},
        "cost": ratios(),
        "machine": machine(),
    }
    print(json.dumps(record, indent=1))
    if "--write" in sys.argv:
        (HERE / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        np.savez_compressed(HERE / "images.npz", **made)


if __name__ == "__main__":
    main()
