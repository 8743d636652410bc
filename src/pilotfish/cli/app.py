"""``pilotfish app``: a page to draw on, in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from pilotfish import bundled
from pilotfish.cli.names import guide, host


@dataclass(frozen=True)
class AppConfig:
    """A page to draw on: no guidance, CFG and a guide side by side. It stays on this machine and
    calls nothing outside it."""

    hosts: tuple[str, ...] = ()
    """Folders or hub ids of pipelines, beside the embedded base, fluent, twemoji and emojione."""
    guides: tuple[str, ...] = ()
    """Folders or hub ids of guides, beside the embedded one."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 lets the network in, whoever that is."""
    port: int | None = None
    """Left out: the first that is free from 7860 on."""
    device: str = "cpu"
    """Where to draw, such as cuda."""
    concurrency: int = 1
    """Drawings that run at the same time; others wait. More of them slow one another down, and
    the seconds shown say so."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(AppConfig, args=list(arguments), prog="pilotfish app", use_underscores=True)
    if config.concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, not {config.concurrency}")
    try:
        from pilotfish.app import page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise RuntimeError(
            "the app needs gradio; install it with: pip install 'pilotfish[app]', or in a clone: "
            "pip install -e '.[app]'"
        ) from error
    from pilotfish.app.drawing import Studio

    hosts = {name: host(name) for name in dict.fromkeys((*bundled.MODELS, *config.hosts))}
    guides = {name: guide(name) for name in dict.fromkeys((*bundled.guide_names(), *config.guides))}
    for pipe in hosts.values():
        pipe.to(config.device)
    page.serve(
        page.build(Studio(hosts, guides), concurrency=config.concurrency), config.host, config.port
    )
