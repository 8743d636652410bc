"""The page of the app, made with gradio. It loads nothing from elsewhere and reports nothing.

Over ``gradio_client`` the endpoints are ``/draw`` and ``/strip``; docs/app.md says what they take.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from pilotfish.app.answers import Answers
from pilotfish.app.drawing import Studio
from pilotfish.evaluation.ways import TITLES, WAYS

EXAMPLES = (
    ("panda", 0), ("smiling face with sunglasses", 3), ("rocket", 3), ("penguin", 4),
    ("birthday cake", 1), ("two hump camel", 3), ("tiger face", 3), ("owl", 1),
)  # fmt: skip
"""Prompts and seeds of the gallery, drawn on the first host with the first guide."""
SCALES = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""What the strip shows first, as far as the guide goes."""
STEPS, SCALE = 25, 4.0
INTRODUCTION = """# Pilotfish
Classifier-free guidance (CFG) runs the denoiser twice a step. A small guide, distilled once, does
the same in one pass, on fine-tunes as well. The same prompt and noise, drawn in three ways:"""
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
HOUR = 3600


def build(studio: Studio, *, concurrency: int = 1, waiting: int = 32) -> gr.Blocks:
    """The page. Its first pictures are drawn here, so that nobody meets an empty one.

    Args:
        concurrency: drawings that run at the same time; further ones wait.
        waiting: how many may wait; the next is asked to come again.
    """
    answers, first = Answers(studio), _first(studio)
    with gr.Blocks(title="Pilotfish", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                controls, draw, another = _controls(studio, first)
            with gr.Column(scale=3, min_width=320):
                with gr.Tabs():
                    with gr.Tab("Three ways"):
                        pictures = _three_ways(answers.draw(**first))
                    with gr.Tab("By guidance scale"):
                        scales, strip_button, strip, strip_file = _by_scale(studio)
                gr.Markdown("#### Examples: click one to draw it")
                gallery = gr.Gallery(
                    answers.examples(
                        [studio.request(**first | {"prompt": p, "seed": s}) for p, s in EXAMPLES]
                    ),
                    show_label=False, columns=len(EXAMPLES), object_fit="contain", height="auto",
                    allow_preview=False, buttons=[], elem_id="gallery",
                )  # fmt: skip

        # one queue for all drawings, and values as they came: the studio says what is wrong
        queued: dict[str, Any] = {
            "concurrency_id": "drawing", "concurrency_limit": concurrency, "preprocess": False,
        }  # fmt: skip
        drawing = queued | {
            "fn": answers.draw, "inputs": list(controls.values()), "outputs": pictures,
            "show_progress_on": pictures[: len(WAYS)],
        }  # fmt: skip
        gr.on(
            [draw.click, controls["prompt"].submit, controls["negative_prompt"].submit],
            api_name="draw", **drawing,
        )  # fmt: skip
        but_w = [c for name, c in controls.items() if name != "guidance_scale"]
        quiet: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        gr.on(
            [strip_button.click, scales.submit], answers.strip, [*but_w, scales],
            [strip, strip_file], api_name="strip", show_progress_on=strip, **queued,
        ).success(lambda: gr.update(interactive=True), None, strip_file, **quiet)  # fmt: skip
        another.click(
            lambda: random.randint(0, studio.limits.seed), None, controls["seed"], **quiet
        )
        controls["guide"].change(
            partial(_steps_of, studio), controls["guide"], controls["num_inference_steps"], **quiet
        )
        chosen = gallery.select(_chosen, None, [controls["prompt"], controls["seed"]], **quiet)
        chosen.then(api_visibility="private", **drawing)
    return page.queue(max_size=waiting)


def serve(
    page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, *, wait: bool = True
) -> str:
    """Serve the page until it is interrupted; without ``wait``, in threads, until ``page.close()``.

    Args:
        host: the address to listen at; the default is this machine only.
        port: None takes the first that is free from 7860 on.

    Returns:
        Where the page is.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO
    ).set(body_text_color_subdued="*neutral_500")
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, share=False, quiet=True,
            ssr_mode=False, run_history=False, footer_links=[], enable_monitoring=False, pwa=False,
            max_file_size="1kb", theme=theme, css_paths=Path(__file__).with_name("page.css"),
        )  # fmt: skip
    except OSError as error:
        taken = f"port {port} of {host} is" if port else f"every port from 7860 on of {host} is"
        raise OSError(f"{taken} taken; choose another with --port") from error
    if wait:
        print(f"the app is at {url} (stop it with Ctrl-C)", flush=True)
        page.block_thread()
    return url


def _first(studio: Studio) -> dict[str, Any]:
    """What the page shows when it opens."""
    guide = next(iter(studio.guides))
    known, (_, high) = studio.guides[guide].timesteps, studio.scale_range(guide)
    prompt, seed = EXAMPLES[0]
    return {
        "host": studio.hosts[0], "guide": guide, "prompt": prompt, "negative_prompt": "",
        "seed": seed, "num_inference_steps": len(known) if known else STEPS,
        "guidance_scale": min(SCALE, high),
    }  # fmt: skip


def _controls(studio: Studio, first: dict[str, Any]) -> tuple[dict[str, Any], gr.Button, gr.Button]:
    """The column at the left: inputs in the order of the API, the button that draws, the one that
    throws the dice."""
    most = studio.limits.characters
    prompt = gr.Textbox(
        first["prompt"], label="Prompt", placeholder="empty: anything", max_length=most,
        elem_id="prompt",
    )  # fmt: skip
    negative = gr.Textbox(
        "", label="Negative prompt", placeholder="none", max_length=most, elem_id="negative"
    )
    with gr.Row():
        host = gr.Dropdown(
            studio.hosts, value=first["host"], label="Model", min_width=110,
            elem_id="host",
        )  # fmt: skip
        guide = gr.Dropdown(
            list(studio.guides), value=first["guide"], label="Guide", min_width=110,
            elem_id="guide",
        )  # fmt: skip
    scale = gr.Slider(
        1, studio.widest, first["guidance_scale"], step=0.1, label="Guidance scale w",
        elem_id="scale",
    )  # fmt: skip
    steps = gr.Slider(
        1, studio.limits.steps, first["num_inference_steps"], step=1, label="Steps",
        elem_id="steps",
    )  # fmt: skip
    with gr.Row(elem_id="seeds"):
        seed = gr.Number(first["seed"], label="Seed", precision=0, min_width=120, elem_id="seed")
        another = gr.Button("New seed", size="md", min_width=110, scale=0, elem_id="another")
    draw = gr.Button("Draw", variant="primary", elem_id="draw")
    inputs = {
        "host": host, "guide": guide, "prompt": prompt, "negative_prompt": negative, "seed": seed,
        "num_inference_steps": steps, "guidance_scale": scale,
    }  # fmt: skip
    return inputs, draw, another


def _three_ways(drawn: list[str]) -> list[Any]:
    """Three pictures, what each took beneath it, and a button for the file of all three."""
    *both, file = drawn
    images, took = [], []
    with gr.Row(elem_id="ways"):
        for i, way in enumerate(WAYS):
            title = TITLES[way][0].upper() + TITLES[way][1:]
            with gr.Column(min_width=100):
                images.append(
                    gr.Image(
                        both[i], label=title, format="png", interactive=False,
                        buttons=["download"], elem_id=f"way-{way}",
                    )
                )  # fmt: skip
                took.append(
                    gr.HTML(both[len(WAYS) + i], label=f"{title} took", elem_id=f"took-{way}")
                )
    return [*images, *took, _download("grid", file)]


def _by_scale(studio: Studio) -> tuple[gr.Textbox, gr.Button, gr.HTML, gr.DownloadButton]:
    """The list of w, the button that draws the strip, the strip and its file."""
    _, high = studio.scale_range(next(iter(studio.guides)))
    with gr.Row(elem_id="scales-row"):
        scales = gr.Textbox(
            ", ".join(f"{w:g}" for w in SCALES if w <= high), scale=3, elem_id="scales",
            label=f"Values of w, at most {studio.limits.scales}",
        )  # fmt: skip
        button = gr.Button(
            "Draw the strip", variant="primary", scale=0, min_width=170, elem_id="draw-strip"
        )
    hint = "The same prompt and seed at several w: CFG above, guided below."
    strip = gr.HTML(f'<p class="hint">{hint}</p>', label="Strip", elem_id="strip")
    return scales, button, strip, _download("strip-grid", None)


def _download(name: str, file: str | None) -> gr.DownloadButton:
    return gr.DownloadButton(
        "Download as PNG", value=file, size="sm", elem_id=name, interactive=file is not None
    )


def _steps_of(studio: Studio, guide: str) -> Any:
    """A guide that was distilled to few steps comes with their number; with any other, it stays."""
    known = studio.guides[guide].timesteps
    return len(known) if known else gr.skip()


def _chosen(event: gr.SelectData) -> tuple[str, int]:
    return EXAMPLES[event.index]
