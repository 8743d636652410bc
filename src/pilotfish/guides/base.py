"""What every guide is: a diffusers model with the signature of its denoiser, which plugs into a
pipeline."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from pilotfish.backbones import Backbone, Origin
from pilotfish.checksums import add_checksum, load_with_checksum
from pilotfish.errors import in_brief
from pilotfish.guidances import Guidance
from pilotfish.guides import hub
from pilotfish.guides.saving import check_config, hub_arguments, saved_in, weight_files
from pilotfish.interface import GuideError, GuideInputs, GuideOutput, Refresh, TextConditions
from pilotfish.pipelines import attach, attached, detach
from pilotfish.refresh import RefreshSteps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoSettings:
    """Settings of a guide type that has none."""


class Guide(ModelMixin, ConfigMixin):
    """A network that takes the place of the second pass of classifier-free guidance.

    Subclasses implement ``forward(inputs: GuideInputs) -> GuideOutput`` so that a fresh guide
    changes nothing, and w = 1 never does. A subclass is registered under the ``guide_type`` of
    its class statement, with the dataclass of its ``settings``. Its configuration holds

    - ``signature``: of the denoisers that it fits (:meth:`pilotfish.backbones.Backbone.signature`);
    - ``guidance_scale_range``: the (low, high) of w in training;
    - ``times``: of a guide distilled to few steps, the normalised times that it was trained at;
    - ``trained_on``: name and revision of the base, where they are known;
    - ``teacher``: the guidance that it was taught, as :meth:`pilotfish.guidances.Guidance.plain`
      gives it; None is CFG;
    - ``refresh_ratio``: the ratio of a call's steps that run both passes by default;
    - ``pilotfish_version``.
    """

    config_name = "config.json"
    registry: ClassVar[dict[str, type[Guide]]] = {}
    """Every type of guide that has been imported, by its name."""
    guide_type: ClassVar[str]
    settings_class: ClassVar[type] = NoSettings
    """What can be chosen of a fresh guide: a dataclass whose fields ``for_denoiser`` takes."""
    learning_rate: ClassVar[float] = 1e-3
    """A default for its training."""

    def __init_subclass__(
        cls, guide_type: str | None = None, settings: type = NoSettings, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if guide_type is not None:
            cls.guide_type, cls.settings_class = guide_type, settings
            Guide.registry[guide_type] = cls

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a denoiser.

        Raises:
            GuideError: the denoiser belongs to no family that takes a guide.
        """
        return cls(Backbone.of(denoiser).signature(prediction_type), **config)  # type: ignore[call-arg]

    def modulations(
        self, time: torch.Tensor, guidance_scale: torch.Tensor, text: TextConditions,
        negative: TextConditions, refresh: Refresh | None = None,
    ) -> Any:  # fmt: skip
        """What of the guide depends on time, scale, text and the last refresh alone, so that a
        pipeline computes it for all steps until the next one at once.

        Args:
            time: (..., N), for example (steps, N).
            guidance_scale: as many dimensions, of a size that broadcasts with them.
            text: N prompts.
            negative: N or 1.
            refresh: of N samples.

        Returns:
            An object whose ``unbind()`` gives one for each index of the first dimension, as
            ``forward`` takes it; None where there is nothing of that kind.
        """
        return None

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        """What to add to the pass.

        Args:
            modulations: what :meth:`modulations` gives for these inputs, where it is known.
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What it was made with, in plain JSON: its configuration without the name of the base, the
        version that saved it and the ratio that it recommends."""
        left = ("_", "trained_on", "pilotfish_version", "refresh_ratio")
        kept = {k: v for k, v in self.config.items() if not k.startswith(left)}
        plain: dict[str, Any] = json.loads(json.dumps(kept))
        return plain

    @property
    def guidance_scale_range(self) -> tuple[float, float]:
        """The (low, high) of w that the guide was trained on."""
        low, high = self.config.guidance_scale_range
        return float(low), float(high)

    @property
    def times(self) -> tuple[float, ...] | None:
        """Normalised times of a guide distilled to few steps; None: any will do."""
        given = self.config.times
        return None if given is None else tuple(given)

    @property
    def refresh_ratio(self) -> float:
        """The ratio of a call's steps that run both passes where ``refresh`` is left out: that of
        the configuration, 0 for a new guide."""
        return float(self.config.get("refresh_ratio", 0.0))

    @property
    def guidance(self) -> Guidance:
        """The guidance that it was taught; a refresh and every comparison use the same."""
        return Guidance.saved(self.config.get("teacher"))

    weak_denoiser: ClassVar[None] = None
    """A guide has not the weaker model of an AutoGuidance that it was taught."""

    @property
    def corrects_refresh(self) -> bool:
        """Whether it adds to the prediction of a step with both passes, too: the steps of a guide
        distilled to few steps are longer than those of CFG."""
        return False

    @property
    def trained_on(self) -> Origin | None:
        """The base that it was trained on, where that is known."""
        return Origin.saved(self.config.trained_on)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the first parameter. The property of diffusers reads all of them, at every
        step."""
        first = next(self.parameters(), None)
        return super().dtype if first is None else first.dtype

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names of the denoiser's modules to whose outputs the guide adds."""
        return ()

    @property
    def extrapolated(self) -> tuple[str, ...]:
        """Names of the attention and modulation layers that the guide extrapolates."""
        return ()

    @property
    def joint_attention(self) -> str:
        """How the answer to the negative prompt is found in attention among text and image:
        ``whole``, by a second attention, or ``sampled``, from :attr:`image_tokens` of the image."""
        return "whole"

    @property
    def image_tokens(self) -> int:
        """With ``sampled`` joint attention, how many of the image's tokens stand for all."""
        return 256

    @property
    def negative_stream(self) -> str:
        """What the negative prompt's tokens attend to in joint attention: ``joint``, also to the
        image's, or ``cached``, to each other alone."""
        return "joint"

    def check(self, signature: Mapping[str, Any], used_on: Origin | None = None) -> None:
        """Refuse a denoiser whose signature differs from the guide's. A denoiser of the same
        signature under another name, such as a fine-tune, is noted in the log.

        Args:
            signature: of the denoiser.
            used_on: name and revision of the denoiser's weights, where they are known.

        Raises:
            GuideError: naming both, and every field that differs, guide's and denoiser's value.
        """
        differs = differences(self.config.signature, signature)
        known = self.trained_on
        names = f"trained on {known or 'an unnamed base'}, used on {used_on or 'an unnamed one'}"
        if differs:
            name = type(self).__name__
            raise GuideError(f"this {name} was made for another denoiser: {names} ({differs})")
        if known is not None and not (used_on and known.same_as(used_on)):
            logger.info("%s: %s; the shapes match", type(self).__name__, names)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """``nn.Module.to``. The method of diffusers warns about precision at every call."""
        return nn.Module.to(self, *args, **kwargs)  # type: ignore[return-value]

    def attach(self, pipe: Any, refresh: RefreshSteps | None = None) -> Self:
        """Put the guide on a pipeline: the same call, one denoiser pass in most steps.

        Args:
            refresh: how many of a call's steps run both passes (0 for none); what ratio of them,
                as a float; or which, counted from 0. After such a step the guide is given the
                difference between the two predictions. Left out: :attr:`refresh_ratio`.

        Returns:
            The guide, so that ``guide = Guide.from_pretrained(...).attach(pipe)`` can be detached.

        Raises:
            GuideError: ``refresh`` is none of those, or needs the weaker model of AutoGuidance,
                which the guide does not hold; a guide is attached already; the pipeline's guidance
                cannot be turned off; the guide was made for another denoiser, or extrapolates
                attention in a way that is not implemented for this one.
        """
        attach(self, pipe, refresh)
        return self

    def detach(self, pipe: Any) -> None:
        """Take the guide off; classifier-free guidance is back, bit for bit.

        Raises:
            GuideError: no guide is attached, or another, or a call of the pipeline is running.
        """
        detach(pipe, self)

    def attached(
        self, pipe: Any, refresh: RefreshSteps | None = None
    ) -> AbstractContextManager[Any]:
        """``with guide.attached(pipe): ...`` attaches for the length of a block.

        Raises:
            GuideError: as :meth:`attach`; and at the end of the block as :meth:`detach`.
        """
        return attached(self, pipe, refresh)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, *, variant: str | None = None, push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """As diffusers does it, with a checksum in every file of weights over the weights and the
        configuration (:mod:`pilotfish.checksums`); ``push_to_hub`` takes this folder, and its
        card, to the hub.

        Raises:
            GuideError: ``safe_serialization=False``: pickles are never read.
        """
        if not kwargs.get("safe_serialization", True):
            raise GuideError("a guide is saved as safetensors only; leave safe_serialization out")
        names = ("repo_id", "commit_message", "private", "token", "create_pr")
        there = {k: kwargs.pop(k) for k in names if k in kwargs}
        super().save_pretrained(save_directory, variant=variant, **kwargs)
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True):
            beside = _config_fields(json.loads((folder / self.config_name).read_text()))
            for path in weight_files(folder, variant):
                add_checksum(path, beside)
        if push_to_hub:
            hub.add_card(self, folder)
            hub.upload(folder, there.pop("repo_id", folder.resolve().name), **there)

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None,
        token: str | bool | None = None, create_pr: bool = False,
    ) -> str:  # fmt: skip
        """Put the guide on the Hugging Face hub, with a model card; as diffusers does it.

        A guide that is as it was loaded from a folder with a card (``pilotfish card``) goes up as
        that folder is; any other with a card that tells nothing measured.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            GuideError: the card in the folder does not belong to the guide.
            ValueError: ``repo_id`` is no hub id.
            OSError: the hub refuses, or cannot be reached.
        """
        how: dict[str, Any] = {
            "commit_message": commit_message, "private": private, "token": token,
            "create_pr": create_pr,
        }  # fmt: skip
        if (folder := hub.unchanged_folder(self)) is not None:
            return hub.upload(folder, repo_id, **how)
        with TemporaryDirectory() as made:
            self.save_pretrained(made)
            hub.add_card(self, Path(made), repo_id)
            return hub.upload(Path(made), repo_id, **how)

    def to_json_string(self) -> str:
        """The configuration as it is saved: without the path that it was once loaded from."""
        fields = json.loads(super().to_json_string())
        fields.pop("_name_or_path", None)
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load a guide of any kind from a folder or hub id, from safetensors only.

        ``Guide.from_pretrained`` gives the kind that the configuration names.

        Raises:
            GuideError: no configuration, an unknown kind or field, a value out of range,
                weights that are missing, damaged, pickled or not finite.
        """
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        where = f"{pretrained_model_name_or_path}"
        try:
            config = cls.load_config(pretrained_model_name_or_path, **hub_arguments(kwargs))
            name = config.get("_class_name")
            known = {found.__name__: found for found in Guide.registry.values()}
            kind = known.get(str(name))
            if kind is None or not issubclass(kind, cls):
                raise GuideError(
                    f"{where} holds a {name!r}, not a {cls.__name__}; "
                    f"known guides: {', '.join(sorted(known))}"
                )
            check_config(config, set(kind._get_init_keys(kind)) - {"self"}, where)
            guide, loaded = super(Guide, kind).from_pretrained(
                pretrained_model_name_or_path, **kwargs
            )
            folder = saved_in(pretrained_model_name_or_path, cls.config_name, kwargs)
            for path in weight_files(folder, kwargs.get("variant")):
                held = load_with_checksum(path, _config_fields(config))
                if whole := [k for k, v in held.items() if not v.is_floating_point()]:
                    raise GuideError(f"{path} holds whole numbers for {whole[0]}, not weights")
        except GuideError:
            raise
        except Exception as error:  # a damaged file can make a constructor do anything
            raise GuideError(f"no guide could be read from {where}: {in_brief(error)}") from error
        for what in ("missing", "unexpected"):
            if keys := sorted(loaded[f"{what}_keys"]):
                raise GuideError(f"the weights in {where} have {what} tensors, first {keys[0]}")
        for parameter in guide.parameters():
            # out of the mapped file, whose tensors are not aligned: products of unaligned memory
            # are rounded differently on some processors
            parameter.data = parameter.data.clone()
        broken = [n for n, p in guide.named_parameters() if not p.isfinite().all()]
        if broken:
            raise GuideError(f"the guide in {where} has values that are not finite in {broken[0]}")
        return guide


def _config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a saved configuration that the checksum covers: not those of diffusers."""
    return {k: v for k, v in config.items() if not k.startswith("_")}


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The fields in which two signatures differ, guide's and denoiser's value; empty if in none.

    Of a long list or table the first entry that differs is named.
    """
    return "; ".join(
        f"{key}: guide {a}, denoiser {b}"
        for key in {**mine, **theirs}
        for a, b in [_first_difference(_plain(mine.get(key)), _plain(theirs.get(key)))]
        if a != b
    )


def _first_difference(mine: Any, theirs: Any) -> tuple[Any, Any]:
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        mine, theirs = (sorted(map(list, table.items())) for table in (mine, theirs))
    if isinstance(mine, list) and isinstance(theirs, list) and mine != theirs:
        pairs = zip_longest(mine, theirs, fillvalue="nothing more")
        place, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        return f"{a} (entry {place + 1} of {len(mine)})", f"{b} (of {len(theirs)})"
    return mine, theirs


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a signature read from JSON compares equal."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value
