"""``pilotfish app``: compare the guidance modes in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from pilotfish import bundled
from pilotfish.cli.names import Dtype, open_guide, open_model, usable_device


@dataclass(frozen=True)
class AppConfig:
    """A page that samples without guidance, with CFG and with a guide, side by side. It stays on
    this machine and calls nothing outside it."""

    models: tuple[str, ...] = tuple(bundled.STYLES)
    """Pipelines to choose from: base, fluent, twemoji, emojione, step-lora, high-contrast,
    monotone, streamline; sd3, sd3-fluent, sd3-twemoji, sd3-emojione; or folders or hub ids."""
    guide: tuple[str, ...] = ()
    """Guides to choose from: bundled ones, or folders or hub ids. Left out: those of the bundled
    bases among the models."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, of models that come in no other."""
    dtype: Dtype = "float32"
    """Precision of the models."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 admits everyone who can reach this machine."""
    port: int | None = None
    """Left out: the first that is free from 7860 on."""
    device: str = "cpu"
    """Where to sample, such as cuda."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(AppConfig, args=list(arguments), prog="pilotfish app", use_underscores=True)
    from pilotfish.app import page  # after --help, which needs no gradio
    from pilotfish.app.session import Session

    bases = dict.fromkeys(map(bundled.base_of, config.models))
    names = config.guide or bundled.guide_names(*bases)
    guides = {name: open_guide(name) for name in names}
    device = usable_device(config.device)
    models = {
        name: open_model(name, config.dtype, config.variant).to(device) for name in config.models
    }
    session = Session(models, guides)
    page.serve(page.build(session), config.host, config.port)
