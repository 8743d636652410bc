"""What a user does first, with installed packages and without the clone.

``.ci/wheels`` and ``.ci/versions`` run it with the Python of an environment, in another folder.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pilotfish
from pilotfish import Guide, bundled

STEPS = 4
LIBRARIES = ("torch", "diffusers", "transformers", "huggingface_hub", "peft", "safetensors")


def draw(pipe: Any, guidance_scale: float = 4.0) -> tuple[torch.Tensor, int]:
    """An image, and the batch rows of all calls of the denoiser."""
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    made = pipe(
        "owl", guidance_scale=guidance_scale, num_inference_steps=STEPS, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    hook.remove()
    return made.images, sum(rows)


def main() -> None:
    """Attach, refresh, detach, save and load; then two commands."""
    assert Path(pilotfish.__file__).is_relative_to(sys.prefix), pilotfish.__file__
    pipe, guide = bundled.load_model(), bundled.load_guide()
    cfg, passes = draw(pipe)
    assert passes == 2 * STEPS, passes
    plain, _ = draw(pipe, 1.0)
    with guide.attached(pipe, refresh=0):
        guided, passes = draw(pipe)
        assert passes == STEPS, passes
        assert torch.equal(draw(pipe, 1.0)[0], plain)
    with guide.attached(pipe, refresh=1):
        refreshed, passes = draw(pipe)
        assert passes == STEPS + 1, passes
    assert torch.equal(draw(pipe)[0], cfg)
    distances = [float((x - cfg).square().mean()) for x in (refreshed, guided, plain)]
    assert distances == sorted(distances), distances

    guide.save_pretrained("guide")
    with Guide.from_pretrained("guide").attached(pipe, refresh=0):
        assert torch.equal(draw(pipe)[0], guided)

    command = [sys.executable, "-m", "pilotfish"]
    few = ["--num_inference_steps", str(STEPS), "--output", "images"]
    subprocess.run([*command, "sample", "-p", "owl", *few], check=True)
    assert Path("images/grid.png").is_file()
    short = {
        "output": "run", "max_train_steps": 2, "train_batch_size": 2, "pool": 4,
        "replay_capacity": 16, "validation_steps": 2, "report_to": "none",
    }  # fmt: skip
    flags = [text for name, value in short.items() for text in (f"--{name}", str(value))]
    Path("prompts.txt").write_text("owl\ncat\n", encoding="utf-8")
    subprocess.run([*command, "distill", "--prompts", "prompts.txt", *flags], check=True)
    Guide.from_pretrained("run/guide").attach(pipe)
    print("used with", *(f"{name} {version(name)}" for name in ("pilotfish", *LIBRARIES)))


if __name__ == "__main__":
    main()
