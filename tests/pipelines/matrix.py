"""What is tested of a guide on diffusers' pipelines: the tests' parametrisation, and the page
of the docs that is made of it.

    python -m tests.pipelines.matrix > docs/compatibility.md
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import diffusers

from pilotfish.pipelines.attach import GUIDER
from tests.pipelines.refused import ATTACHED, CONFIG, PAG, WHY
from tests.pipelines.specs import OTHERS, PIPELINES

EVERY = tuple(PIPELINES)


def family(*names: str) -> tuple[str, ...]:
    """The pipelines of some families."""
    return tuple(n for n in EVERY if PIPELINES[n].family in names)


UNET, SD3, PIXART = family("SD", "SDXL"), family("SD3"), family("PixArt")
ONE = (
    "SD", "SDXL", "SD3", "PixArt-Sigma", "Sana", "Lumina2", "AuraFlow", "FLUX.2 klein", "Wan",
    "LTX", "Chroma", "CogView4", "Qwen-Image", "Z-Image",
)  # fmt: skip
"""One of each family."""
TOGETHER = tuple(n for n in ONE if n not in ("FLUX.2 klein", "Qwen-Image", "Z-Image"))
"""Those of which one call of ``encode_prompt`` makes prompt and negative prompt."""
COMPILED = ("SD", "SDXL", "SD3", "PixArt-Sigma", "Sana")
PLAIN = ("SD", "SD, v", "SDXL")
SOME = (*PLAIN, "SD ControlNet")
ADAPTED = (*SOME, "SD img2img", "SDXL ControlNet")
MORE = (*SOME, "SD3", "PixArt-Sigma")
JOINED = ("AuraFlow", "FLUX.2 klein", "Chroma", "CogView4")


def taking(*arguments: str) -> tuple[str, ...]:
    """The pipelines whose call takes these arguments."""
    calls = {
        n: inspect.signature(getattr(diffusers, spec.pipeline).__call__)
        for n, spec in PIPELINES.items()
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
CUTOFF = (*(n for n in STEP_END if n in UNET and "depth2img" not in n), "SD3")
SAME = "one call a step, fresh is conditional"
HEUN = "one call a step and Heun's further calls, fresh is conditional"

FEATURES = {
    "one pass": Feature("one denoiser call a step, at batch N: for one prompt, or a list", EVERY),
    "fresh": Feature("an untrained guide is the conditional model, bit for bit", EVERY),
    "w ≤ 1": Feature("the conditional model, bit for bit, whatever the guide", EVERY),
    "detach": Feature("CFG is back, bit for bit", EVERY),
    "shared denoiser": Feature("a plain pipeline on the same denoiser does CFG", EVERY),
    "shared and guided": Feature(
        "another guided one there may get a LoRA, and lose its guide, in the middle of a call",
        (*SOME, "SD3"),
    ),
    "negative_prompt": Feature("reaches the guide image by image", EVERY),
    "no negative prompt": Feature(
        "the guide is given what CFG would take: the empty text, or zeros (SDXL)", EVERY
    ),
    "negative prompt of another length": Feature(
        "than the prompt, which CFG in one batch cannot take", TOGETHER
    ),
    "num_images_per_prompt": Feature(
        "one call a step at N times as many",
        [name for name in EVERY if name not in family("Wan", "LTX")],
    ),
    "prompt_embeds": Feature("given embeddings are as good as prompts", EVERY),
    "prompt_embeds, other precision": Feature(
        "half precision given float32, as CFG", (*PLAIN, "PixArt-Sigma")
    ),
    "encode_prompt replaced": Feature(
        "on the object, to weight prompts; one that returns no negative prompt is refused", TOGETHER
    ),
    "clip_skip": Feature(
        "holds for the prompt; the negative prompt is that of CFG", (*family("SDXL"), *SD3)
    ),
    "callback_on_step_end": Feature("sees and changes the latents", STEP_END),
    "callback": Feature("the older kind: sees the latents", (*PIXART, "SD T2I-Adapter")),
    "conditions from a callback": Feature(
        "for both halves, as CFG needs them: the guide has the negative prompt's", (*SOME, "SD3")
    ),
    "LoRA from a callback": Feature("loaded between two steps, as enabled then", (*SOME, "SD3")),
    "denoiser from a callback": Feature(
        "exchanged between two steps: guided as before", (*SOME, "SD3")
    ),
    "weights from a callback": Feature(
        "changed between two steps: the guide sees it", (*SOME, "SD3")
    ),
    "CFG cutoff": Feature("diffusers' own callback turns the guide off for the rest", CUTOFF),
    "dynamic CFG": Feature(
        "a callback that takes `prompt_embeds.chunk(2)[-1]` turns the guide off for the rest",
        [n for n in CUTOFF if PIPELINES[n].family != "SDXL"],
    ),
    "IP-Adapter, image": Feature("the image's embeddings, not doubled", ADAPTED),
    "IP-Adapter, embeds": Feature("given as for CFG, doubled", ADAPTED),
    "LoRA": Feature(
        "loaded before or after attaching, the same bit for bit; unloaded, the guide is as before, "
        "up to rounding",
        (*ADAPTED, *SD3, *PIXART, *JOINED),
    ),
    "LoRA scale": Feature(
        "`cross_attention_kwargs` or `joint_attention_kwargs` reach the denoiser",
        (*ADAPTED, "SD3"),
    ),
    "textual inversion": Feature("a learned token in both prompts", SOME),
    "DDIMScheduler": Feature(
        "one call a step, fresh is conditional", (*PLAIN, "PixArt-Sigma")
    ),
    "DDPMScheduler": Feature(SAME, (*PLAIN, "PixArt-Sigma")),
    "PNDMScheduler": Feature(SAME, PLAIN),
    "EulerDiscreteScheduler": Feature(SAME, (*PLAIN, "PixArt-Sigma")),
    "EulerAncestralDiscreteScheduler": Feature(SAME, (*PLAIN, "PixArt-Sigma")),
    "DPMSolverMultistepScheduler": Feature(SAME, ("SD3", *PLAIN, *PIXART)),
    "UniPCMultistepScheduler": Feature(SAME, ("SD3", *PLAIN, "PixArt-Sigma")),
    "LMSDiscreteScheduler": Feature(SAME, PLAIN),
    "HeunDiscreteScheduler": Feature(HEUN, PLAIN),
    "LCMScheduler": Feature(SAME, (*PLAIN, "PixArt-Sigma")),
    "FlowMatchEulerDiscreteScheduler": Feature(SAME, SD3),
    "FlowMatchHeunDiscreteScheduler": Feature(HEUN, ("SD3",)),
    "prediction_type": Feature(
        "changed after attaching, or from a callback: refused, naming both", ("SD", "SD, v", "SD3")
    ),
    "half precision": Feature(
        "bfloat16 and float16; the guide itself stays as it is", (*MORE, *JOINED)
    ),
    "model offload": Feature("with accelerate's hooks, CPU to CPU", (*MORE, *JOINED)),
    "sequential offload": Feature("with weights on no device, CPU to CPU", (*MORE, *JOINED)),
    "attention slicing": Feature("the same images, up to rounding", SOME),
    "fuse_qkv_projections": Feature(
        "the same images, up to rounding", (*SOME, "PixArt-Sigma")
    ),
    "refresh": Feature(
        "both passes in some steps: in all of them CFG's images, up to rounding; the steps and "
        "passes are counted; nothing is kept after the call",
        EVERY,
    ),
    "FreeU": Feature("one call a step, fresh is conditional", SOME),
    "torch.compile": Feature(
        "with `fullgraph=True`, before or after attaching, the same up to rounding; another w, "
        "prompt, negative prompt or number of steps compiles nothing anew (captured by "
        "torch.compile; its kernels are not what is tested)",
        COMPILED,
    ),
    "compile_repeated_blocks": Feature(
        "block by block with `fullgraph=True`, of a denoiser with many; the same up to rounding",
        ("SD",),
    ),
    "threads": Feature("guided and plain on one denoiser at the same time", ONE),
    "threads, two precisions": Feature(
        "one guide on a float32 and a bfloat16 pipeline at the same time", ONE
    ),
    "save_pretrained": Feature("nothing of the guide is saved", MORE),
    "pickle": Feature(
        "also to a spawned process: with its guide; a plain pipeline on the same denoiser, and the "
        "denoiser, without",
        ONE,
    ),
    "copy": Feature("`copy` and `deepcopy`: the copy has the guide as well", ONE),
    "from_pipe": Feature("another pipeline from a guided one does CFG", ("SD", "SDXL", "SD3")),
    "another denoiser": Feature(
        "`pipe.unet = ...`, `pipe.transformer = ...`: guided if it fits, else refused", MORE
    ),
    "ExternalGuide": Feature(
        "fresh it is conditional, trained it is not, one call a step", SOME
    ),
    "FullGuide": Feature("fresh it is conditional, trained it is not, one call a step", SOME),
    "guidance_rescale": Feature("acts on the second pass", taking("guidance_rescale"), True),
    "guess_mode": Feature(
        "leaves ControlNet out of the second pass", taking("guess_mode"), True
    ),
    "negative_original_size": Feature(
        "is the second pass's size", taking("negative_original_size"), True
    ),
    "skip_guidance_layers": Feature(
        "makes a further pass", taking("skip_guidance_layers"), True
    ),
    "cfg_normalization": Feature(
        "is another rule of CFG than that which the guide learned", taking("cfg_normalization"),
        True,
    ),
    "cfg_trunc_ratio": Feature(
        "ends the second pass on the way", taking("cfg_trunc_ratio"), True
    ),
}  # fmt: skip


IP_ADAPTER = """\
A layer's output holds the image's part as well as the text's, and the output for the negative \
prompt holds no image, so a guide extrapolates the image along with the prompt."""

PAGE = """\
# Where a guide works

Every mark on this page is a test in `tests/pipelines`: diffusers' own pipelines on tiny random \
components, with a tiny guide attached. It is the wiring that is tested, not the images: \
{works} cells work, {warns} work with a warning, {refuses} pipelines are refused. What has no mark \
has no test. *SD, v* is what Stable Diffusion 2.x is: v prediction. The page is generated from the \
tests' parametrisation by `python -m tests.pipelines.matrix > docs/compatibility.md`.

A guide is made for one denoiser and works in all pipelines around it. A pipeline whose denoiser \
differs in shape needs a guide of its own.

## Stable Diffusion

{sd}

## Stable Diffusion XL

{xl}

## Stable Diffusion 3

{sd3}

## The other transformers

{others}

## Notes

- *IP-Adapter.* {ip_adapter}
- *Refresh.* These rows are tested with refreshes too, on the pipelines that are marked: \
*negative_prompt*, *negative prompt of another length* (SD3, Wan, AuraFlow and Chroma refuse it), \
*num_images_per_prompt*, *prompt_embeds*, *w ≤ 1*, *conditions from a callback*, \
*LoRA from a callback*, *CFG cutoff*, *dynamic CFG*, *IP-Adapter*, *LoRA*, every scheduler, \
*half precision*, *model offload*, *sequential offload*, *torch.compile*, *threads*, *pickle*, \
*copy* and *ExternalGuide*. What acts on the second pass alone is warned of with a refresh as \
well, and has no effect there.
- *Pickle.* The text encoders of transformers cannot be pickled once they have given their hidden \
states (SDXL, SD3), in a plain pipeline as in a guided one: pickle before the first call.
- *FLUX.2 klein.* Its pipeline takes no `negative_prompt`; that row is tested with \
`negative_prompt_embeds`. Of another length than the prompt they are refused in a step with both \
passes.
- *Chroma.* `ChromaInpaintPipeline` of diffusers 0.42.1 fails without a guide, too. An IP-Adapter \
is refused in the call.
- *CogView4* masks no text. For a refresh with a prompt and a negative prompt of two lengths its \
attention layers have a processor that masks while a guide is attached; where there is no mask it \
does what that of diffusers does.
- *PixArt-Alpha at 1024 pixels* gives its denoiser resolution and aspect ratio, and is refused \
(`use_additional_conditions`).
- *Wan.* One guide works on both denoisers of Wan 2.2, which are of one shape: at the steps of \
`transformer_2` it is given `guidance_scale_2`, and what the last refresh found stays known there. \
`guidance_scale` decides for both whether there is guidance, as without a guide. Tested with \
*image-to-video*, too: a last image, and a first frame at a time of its own (`expand_timesteps`).
- *Qwen-Image.* `QwenImageEditPlusPipeline` (also with `zero_cond_t`) and \
`QwenImageEditInpaintPipeline` are tested with one prompt: one pass, fresh, detach and refresh. \
Both prompts are encoded with the image that is edited, and the guide adds to the tokens of the \
generated image alone. The ControlNet reads the prompt alone, for both passes. \
`QwenImageLayeredPipeline` is refused.

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


def covered(feature: str) -> list[str]:
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
    config = ", ".join(f"`{k}={v}`" for k, v in CONFIG.get(name, {}).items())
    return f"`{name}`" + (f" with {config}" if config else "")


def page() -> str:
    """The page of the docs."""
    works = sum(len(f.pipelines) for f in FEATURES.values() if not f.warns)
    warns = sum(len(f.pipelines) for f in FEATURES.values() if f.warns)
    refused = "\n".join(f"| {why} | {', '.join(map(shown, names))} |" for why, names in WHY.items())
    refused += f"\n| {GUIDER} | `HunyuanImagePipeline` with a guider |"
    return PAGE.format(
        works=works, warns=warns, refuses=len(ATTACHED) + len(PAG), sd=table(family("SD")),
        xl=table(family("SDXL")), sd3=table(SD3), others=table(family(*OTHERS)),
        refused=refused, pag=", ".join(map(shown, PAG)), ip_adapter=IP_ADAPTER,
    )  # fmt: skip


if __name__ == "__main__":
    print(page(), end="")
