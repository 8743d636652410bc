"""What is tested of a guide on diffusers' pipelines: the tests' parametrisation, and the page
of the docs that is made of it.

    python -m tests.pipelines.matrix > docs/compatibility.md
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers

from tests.pipelines.hosts import KINDS
from tests.pipelines.refused import ATTACHED, PAG, UNETS, WHY

EVERY = tuple(KINDS)
XL = tuple(n for n in EVERY if KINDS[n].xl)
SD = tuple(n for n in EVERY if n not in XL)
PLAIN = ("SD", "SD, v", "SDXL")
SOME = ("SD", "SD, v", "SD ControlNet", "SDXL")
ADAPTED = (*SOME, "SD img2img", "SDXL ControlNet")


def taking(*arguments: str) -> tuple[str, ...]:
    """The pipelines whose call takes these arguments."""
    calls = {
        n: inspect.signature(getattr(diffusers, k.pipeline).__call__) for n, k in KINDS.items()
    }
    return tuple(n for n, call in calls.items() if set(arguments) <= set(call.parameters))


@dataclass(frozen=True)
class Feature:
    """One row.

    Attributes:
        says: what is tested, or what is warned of.
        pipelines: on which.
        warns: whether it works with a warning.
    """

    says: str
    pipelines: Sequence[str]
    warns: bool = False


STEP_END = taking("callback_on_step_end")
CUTOFF = tuple(n for n in STEP_END if "depth2img" not in n)

FEATURES = {
    "one pass": Feature("one denoiser call a step, at batch N: for one prompt, or a list", EVERY),
    "fresh": Feature("an untrained guide is the conditional model, bit for bit", EVERY),
    "w ≤ 1": Feature("the conditional model, bit for bit, whatever the guide", EVERY),
    "detach": Feature("CFG is back, bit for bit", EVERY),
    "shared denoiser": Feature("a plain pipeline on the same denoiser does CFG", EVERY),
    "shared and guided": Feature(
        "another guided one there may get a LoRA, and lose its guide, in the middle of a call", SOME
    ),
    "negative_prompt": Feature("reaches the guide picture by picture", EVERY),
    "no negative prompt": Feature("zeros reach the guide, as they do CFG", XL),
    "num_images_per_prompt": Feature("one call a step at N times as many", EVERY),
    "prompt_embeds": Feature("given embeddings are as good as prompts", EVERY),
    "clip_skip": Feature("holds for the prompt; the negative prompt is that of CFG", XL),
    "callback_on_step_end": Feature("sees and changes the latents", STEP_END),
    "conditions from a callback": Feature(
        "for both halves, as CFG needs them: the guide has the negative prompt's", SOME
    ),
    "LoRA from a callback": Feature("loaded between two steps, as enabled then", SOME),
    "denoiser from a callback": Feature("exchanged between two steps: guided as before", SOME),
    "weights from a callback": Feature("changed between two steps: the guide sees it", SOME),
    "CFG cutoff": Feature("diffusers' own callback turns the guide off for the rest", CUTOFF),
    "dynamic CFG": Feature(
        "a callback that takes `prompt_embeds.chunk(2)[-1]` turns the guide off for the rest",
        [n for n in CUTOFF if n in SD],
    ),
    "IP-Adapter, image": Feature("the picture's embeddings, not doubled", ADAPTED),
    "IP-Adapter, embeds": Feature("given as for CFG, doubled", ADAPTED),
    "LoRA": Feature("loaded before or after attaching, the same bit for bit", ADAPTED),
    "LoRA scale": Feature("`cross_attention_kwargs` reaches the denoiser", ADAPTED),
    "LoRA unloaded": Feature("the guide is as before, up to rounding", ADAPTED),
    "textual inversion": Feature("a learned token in both prompts", SOME),
    "DDIMScheduler": Feature("one call a step, fresh is conditional", PLAIN),
    "DDPMScheduler": Feature("the same", PLAIN),
    "PNDMScheduler": Feature("the same", PLAIN),
    "EulerDiscreteScheduler": Feature("the same", PLAIN),
    "EulerAncestralDiscreteScheduler": Feature("the same", PLAIN),
    "DPMSolverMultistepScheduler": Feature("the same", PLAIN),
    "UniPCMultistepScheduler": Feature("the same", PLAIN),
    "LMSDiscreteScheduler": Feature("the same", PLAIN),
    "HeunDiscreteScheduler": Feature("the same, with its further calls in between", PLAIN),
    "LCMScheduler": Feature("the same", PLAIN),
    "prompt_embeds, other precision": Feature("half precision given float32, as CFG", PLAIN),
    "half precision": Feature("the guide follows into bfloat16 and float16", SOME),
    "model offload": Feature("with accelerate's hooks, CPU to CPU", SOME),
    "sequential offload": Feature("with weights on no device, CPU to CPU", SOME),
    "attention slicing": Feature("the same pictures, up to rounding", SOME),
    "fuse_qkv_projections": Feature("the same pictures, up to rounding", SOME),
    "FreeU": Feature("one call a step, fresh is conditional", SOME),
    "torch.compile": Feature(
        "with `fullgraph=True`, before or after attaching, the same up to rounding; another w, "
        "prompt, negative prompt or number of steps compiles nothing anew (captured by "
        "torch.compile; its kernels are not what is tested)",
        SOME,
    ),
    "compile_repeated_blocks": Feature(
        "block by block with `fullgraph=True`, of a denoiser with many; the same up to rounding",
        ("SD",),
    ),
    "threads": Feature("guided and plain on one denoiser at the same time", ("SD", "SDXL")),
    "save_pretrained": Feature("nothing of the guide is saved", SOME),
    "from_pipe": Feature("another pipeline from a guided one does CFG", ("SD", "SDXL")),
    "another denoiser": Feature("`pipe.unet = ...`: guided if it fits, else refused", SOME),
    "ExternalGuide": Feature("fresh it is conditional, trained it is not, one call a step", SOME),
    "FullGuide": Feature("the same", SOME),
    "guidance_rescale": Feature("acts on the second pass", taking("guidance_rescale"), True),
    "guess_mode": Feature(
        "leaves ControlNet out of the second pass", taking("guess_mode"), True
    ),
    "negative_original_size": Feature(
        "is the second pass's size", taking("negative_original_size"), True
    ),
}  # fmt: skip


PAGE = """\
# Where a guide works

Every mark on this page is a test in `tests/pipelines`: diffusers' own pipelines on tiny random \
components, with a tiny guide attached. It is the wiring that is tested, not the pictures: \
{works} cells work, {warns} work with a warning, {refuses} pipelines are refused. What has no mark \
has no test. *SD, v* is what Stable Diffusion 2.x is: v prediction. The page is made of the \
tests' parametrisation by `python -m tests.pipelines.matrix > docs/compatibility.md`.

A guide is made for one denoiser and works in all pipelines around it. A pipeline whose denoiser \
differs in shape needs a guide of its own.

## Stable Diffusion

{sd}

## Stable Diffusion XL

{xl}

## Warned of

An argument that acts on the second pass has none to act on. The call goes on without that \
effect and warns.

## Refused

When a guide is attached: such a pipeline "cannot take a guide".

| because | pipelines |
|---|---|
{refused}

In a call, as long as `pag_scale` is above 0: {pag}.
"""


def pipelines(feature: str) -> list[str]:
    """The pipelines on which a feature is tested."""
    return list(FEATURES[feature].pipelines)


def table(names: Sequence[str]) -> str:
    """Features down, pipelines across."""
    rows = [["", *names, "what is tested"], ["---", *[":-:"] * len(names), "---"]]
    for name, feature in FEATURES.items():
        mark = "warns" if feature.warns else "✓"
        marks = [mark if n in feature.pipelines else "" for n in names]
        if any(marks):
            rows.append([name, *marks, feature.says])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def shown(name: str) -> str:
    """A refused pipeline, and what it is refused with."""
    config = ", ".join(f"`{k}={v}`" for k, v in UNETS.get(name, {}).items())
    return f"`{name}`" + (f" with {config}" if config else "")


def page() -> str:
    """The page of the docs."""
    works = sum(len(f.pipelines) for f in FEATURES.values() if not f.warns)
    warns = sum(len(f.pipelines) for f in FEATURES.values() if f.warns)
    refused = "\n".join(f"| {why} | {', '.join(map(shown, names))} |" for why, names in WHY.items())
    return PAGE.format(
        works=works, warns=warns, refuses=len(ATTACHED) + len(PAG), sd=table(SD), xl=table(XL),
        refused=refused, pag=", ".join(map(shown, PAG)),
    )  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
