"""The model card of a guide: README.md beside it, with the header that the Hugging Face hub
reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from pilotfish.backbones import Backbone
from pilotfish.guidances import CFG

if TYPE_CHECKING:
    from pilotfish.guides.base import Guide

TEMPLATE = Path(__file__).with_name("card.md.j2")
TAGS = ["pilotfish", "diffusers", "classifier-free-guidance", "distillation"]


def model_card(
    guide: Guide,
    weights: Mapping[str, str],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    licence: str | None = None,
    repo_id: str | None = None,
    grid: str | None = None,
    measured: str = "",
    results: Sequence[EvalResult] = (),
    trained: str = "",
) -> ModelCard:
    """The model card of a guide.

    Args:
        guide: the guide.
        weights: the SHA-256 of each file of weights, by its name.
        base_model: hub id of the base. Left out: the name in the guide's configuration.
        revision: the base's commit. Left out: the one in the guide's configuration.
        licence: its name on the hub, such as apache-2.0.
        repo_id: the hub id under which the guide will be found.
        grid: name of an image beside the card.
        measured: the measured figures, in Markdown.
        results: the same for the header.
        trained: how it was trained, in Markdown.

    Raises:
        ValueError: ``base_model`` or ``repo_id`` is no hub id.
    """
    for given in (base_model, repo_id):
        if given is not None:
            validate_repo_id(given)
    origin = guide.trained_on
    if origin is not None and base_model in (None, origin.name):
        revision = revision or origin.revision
    known = base_model or (origin.name if origin else None)
    # the hub refuses a header whose base is none of its own; the name of a folder has no owner
    listed = known if base_model or (known and "/" in known) else None
    title = (repo_id or f"{known or 'unnamed base'}, guide").rpartition("/")[2]
    (low, high), taught = guide.guidance_scale_range, guide.guidance
    usage = _usage(guide)
    data = ModelCardData(
        base_model=listed,
        base_model_relation="adapter" if listed else None,
        library_name="pilotfish",
        license=licence,
        pipeline_tag="text-to-video" if usage["output"] == "frame" else "text-to-image",
        tags=list(TAGS),
        eval_results=list(results) or None,
        model_name=title if results else None,
    )
    card: ModelCard = ModelCard.from_template(
        data, template_path=str(TEMPLATE),
        title=title,
        base=f"[{known}](https://huggingface.co/{known})" if listed else known or "an unnamed base",
        base_path=known if listed else f"path/to/{known or 'base'}",
        guide_path=repo_id or "path/or/hub-id-of-this-guide",
        revision=revision,
        kind=type(guide).__name__,
        parameters=f"{guide.num_parameters():,}",
        low=f"{low:g}", high=f"{high:g}",
        **usage,
        steps=len(guide.times) if guide.times else None,
        version=guide.config.pilotfish_version, refresh_ratio=f"{guide.refresh_ratio:.0%}",
        taught=None if taught == CFG else f"{taught.title} (`{taught}`)",
        denoiser=_shape(guide),
        grid=grid, measured=measured.strip(), trained=trained.strip(), weights=weights,
        licence=licence,
    )  # fmt: skip
    return card


def _usage(guide: Guide) -> dict[str, Any]:
    """What the guide's pipelines are called with, in the template's words."""
    family = Backbone.of_family(guide.config.signature["family"])
    low, high = guide.guidance_scale_range
    scale = min(max(4.0, low), high) - family.scale_offset
    steps = len(guide.times) if guide.times else None
    call: dict[str, Any] = {family.scale_argument: f"{scale:g}"}
    if family.separate_negative and family.default_negative is None:
        call["negative_prompt"] = '" "'  # without one it makes no second pass
    scheduler = None
    if steps is None or guide.config.signature["prediction_type"] != "flow":
        scheduler = "ddim" if steps else None
        call["num_inference_steps"] = steps or 25
    else:
        scheduler = None if family.takes_times else "even"
        for name, value in family(None).even_grid(steps).items():
            many = isinstance(value, list)
            call[name] = f"[{', '.join(f'{v:g}' for v in value)}]" if many else value
    return {
        "call": ", ".join(f"{name}={value}" for name, value in call.items()),
        "scheduler": scheduler,
        "output": "image" if family.temporal_factor is None else "frame",
    }


def _shape(guide: Guide) -> str:
    """The denoisers that a guide fits, in words."""
    made_for = guide.config.signature
    widths = sorted({channels for _, channels in made_for["layers"]})
    return (
        f"a denoiser of the family `{made_for['family']}` with {len(made_for['layers'])} layers of "
        f"{', '.join(map(str, widths))} channels, text of width {made_for['text_dim']}, "
        f"{made_for['prediction_type']}"
    )
