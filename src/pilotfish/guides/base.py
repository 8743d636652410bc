"""What every guide is: a diffusers model with a fingerprint, which plugs into a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from torch import nn

from pilotfish.attach import attach, attached, detach
from pilotfish.contract import GuideError, GuideInputs, Injection
from pilotfish.denoisers import fingerprint
from pilotfish.guides.files import hub_arguments, saved_in, weight_files
from pilotfish.seals import load_sealed, seal


class Guide(ModelMixin, ConfigMixin):
    """A network that stands in for the second pass of classifier-free guidance.

    Subclasses implement ``forward(inputs: GuideInputs) -> Injection`` so that a fresh guide
    injects exact zeros, and w = 1 always does. Their configuration holds

    - ``denoiser``: the fingerprint of the denoiser family it was made for
      (:func:`pilotfish.denoisers.fingerprint`);
    - ``guidance_scale_range``: the (low, high) of w in training;
    - ``timesteps``: of a guide distilled to few steps, those that it was trained at;
    - ``pilotfish_version``.
    """

    config_name = "config.json"
    kinds: ClassVar[dict[str, type[Guide]]] = {}
    learning_rate: ClassVar[float] = 1e-3
    """What suits its training, where nothing else is asked for."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Guide.kinds[cls.__name__] = cls

    @classmethod
    def for_denoiser(cls, unet: UNet2DConditionModel, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet."""
        return cls(fingerprint(unet, prediction_type), **config)  # type: ignore[call-arg]

    def forward(self, inputs: GuideInputs) -> Injection:
        """The features to add. See :class:`GuideInputs` and :class:`Injection`."""
        raise NotImplementedError

    @property
    def guidance_scale_range(self) -> tuple[float, float]:
        """The (low, high) of w that the guide was trained on."""
        low, high = self.config.guidance_scale_range
        return float(low), float(high)

    @property
    def timesteps(self) -> tuple[int, ...] | None:
        """Those that a guide distilled to few steps was trained at; None: any will do."""
        given = self.config.timesteps
        return None if given is None else tuple(given)

    @property
    def touches(self) -> tuple[str, ...]:
        """Names of the denoiser's modules to whose outputs the guide adds."""
        return ()

    @property
    def pushes(self) -> tuple[str, ...]:
        """Names of the layers that take in the text whose answers the guide pushes."""
        return ()

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a denoiser that the guide was not made for.

        Raises:
            GuideError: naming every field that differs, guide's and denoiser's value.
        """
        mine = {k: _plain(v) for k, v in self.config.denoiser.items()}
        theirs = {k: _plain(v) for k, v in fingerprint.items()}
        differs = [k for k in mine | theirs if mine.get(k) != theirs.get(k)]
        if differs:
            sides = "; ".join(
                f"{k}: guide {mine.get(k)}, denoiser {theirs.get(k)}" for k in differs
            )
            raise GuideError(f"this {type(self).__name__} was made for another denoiser ({sides})")

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As any module; diffusers' own warns of every dtype, though nothing is to be kept."""
        return nn.Module.to(self, *args, **kwargs)  # type: ignore[return-value]

    def attach(self, pipe: Any) -> None:
        """Put the guide on a pipeline: the same call, one denoiser pass a step."""
        attach(self, pipe)

    def detach(self, pipe: Any) -> None:
        """Take the guide off; classifier-free guidance is back, bit for bit."""
        detach(self, pipe)

    def attached(self, pipe: Any) -> AbstractContextManager[Any]:
        """``with guide.attached(pipe): ...`` attaches for the length of a block."""
        return attached(self, pipe)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, *, variant: str | None = None, push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """As diffusers does it, and every file of weights sealed together with the configuration
        (:mod:`pilotfish.seals`).

        Raises:
            GuideError: pickles are asked for, which would never be read.
        """
        if not kwargs.get("safe_serialization", True):
            raise GuideError("a guide is saved as safetensors only; leave safe_serialization out")
        super().save_pretrained(save_directory, variant=variant, **kwargs)
        if kwargs.get("is_main_process", True):
            folder = Path(save_directory)
            beside = _sealed_fields(json.loads((folder / self.config_name).read_text()))
            for path in weight_files(folder, variant):
                seal(path, beside)
        if push_to_hub:
            names = ("commit_message", "private", "token", "create_pr")
            how = {n: kwargs[n] for n in names if n in kwargs}
            where = kwargs.get("repo_id", Path(save_directory).name)
            self.push_to_hub(where, variant=variant, **how)

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
            kind = Guide.kinds.get(name)
            if kind is None or not issubclass(kind, cls):
                raise GuideError(
                    f"{where} holds a {name!r}, not a {cls.__name__}; "
                    f"known guides: {', '.join(sorted(Guide.kinds))}"
                )
            kind._check_config(config, where)
            guide, loaded = super(Guide, kind).from_pretrained(
                pretrained_model_name_or_path, **kwargs
            )
            folder = saved_in(pretrained_model_name_or_path, cls.config_name, kwargs)
            for path in weight_files(folder, kwargs.get("variant")):
                held = load_sealed(path, _sealed_fields(config))
                if whole := [k for k, v in held.items() if not v.is_floating_point()]:
                    raise GuideError(f"{path} holds whole numbers for {whole[0]}, not weights")
        except GuideError:
            raise
        except Exception as error:  # a damaged file can make a constructor do anything
            why = _first_line(error)
            raise GuideError(f"no guide could be read from {where}: {why}") from error
        for what in ("missing", "unexpected"):
            if keys := sorted(loaded[f"{what}_keys"]):
                raise GuideError(f"the weights in {where} have {what} tensors, first {keys[0]}")
        broken = [n for n, p in guide.named_parameters() if not p.isfinite().all()]
        if broken:
            raise GuideError(f"the guide in {where} has values that are not finite in {broken[0]}")
        return guide

    @classmethod
    def _check_config(cls, config: Mapping[str, Any], where: str) -> None:
        known = set(cls._get_init_keys(cls)) - {"self"}
        unknown = [k for k in config if not k.startswith("_") and k not in known]
        if unknown:
            raise GuideError(f"the configuration in {where} has unknown fields: {unknown}")
        negative = [k for k, v in config.items() if isinstance(v, int | float) and v < 0]
        if negative:
            raise GuideError(
                f"the configuration in {where} has {negative[0]} {config[negative[0]]}; "
                "0 or more is needed"
            )
        given = config.get("timesteps")
        if given is not None and not _falling(given):
            raise GuideError(
                f"the configuration in {where} has timesteps {given}; falling whole numbers "
                "are needed"
            )
        low, high = config.get("guidance_scale_range", (1.0, 1.0))
        if not 1 <= low <= high:
            raise GuideError(
                f"the configuration in {where} has guidance_scale_range [{low}, {high}]; "
                "1 <= low <= high is needed"
            )


def _falling(timesteps: Any) -> bool:
    """Whether these are whole numbers from high to low, none twice."""
    if not isinstance(timesteps, Sequence) or any(type(t) is not int for t in timesteps):
        return False
    return len(timesteps) > 0 and timesteps[-1] >= 0 and all(a > b for a, b in pairwise(timesteps))


def _sealed_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a saved configuration the seal is over: not what diffusers notes for itself."""
    return {k: v for k, v in config.items() if not k.startswith("_")}


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain(value: Any) -> Any:
    """Tuples and lists alike, so that a fingerprint read from JSON compares equal."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value
