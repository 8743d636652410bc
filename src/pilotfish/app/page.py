"""The page of the app, made with gradio. It loads nothing from elsewhere and reports nothing.

Over ``gradio_client`` the endpoint is ``/draw``; docs/app.md says what it takes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from pilotfish.app.session import IMAGES, MODES, REFRESHES, Batch, Request, RequestError, Session
from pilotfish.guidance import GuidanceMode

SEED_RANGE = 2**32 - IMAGES
HOUR, WAITING = 3600, 32
SIDE = 256
"""Smaller images are enlarged to so many pixels."""
INTRODUCTION = f"""# Pilotfish
Classifier-free guidance (CFG) runs the denoiser twice a step. A guide, distilled once, takes the
place of the second pass, on fine-tunes too. {IMAGES} images of each mode, from the same noise:"""
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
"""

PROGRESS = gr.Progress()


def build(session: Session) -> gr.Blocks:
    """The page. One request is drawn at a time; of those that wait, the first come first."""
    with gr.Blocks(title="Pilotfish", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                inputs = _inputs(session)
                counted = [inputs["num_inference_steps"], inputs["refresh"]]
                saved = gr.Markdown(passes(*(dial.value for dial in counted)), elem_id="passes")
                seed = gr.Button("New seed", size="sm", elem_id="new-seed")
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=320):
                outputs = _outputs()
        gr.on(
            [draw.click, inputs["prompt"].submit, inputs["negative_prompt"].submit],
            handler(session), list(inputs.values()), outputs, api_name="draw",
            # the values as they came: the session says what is wrong with one
            concurrency_limit=1, preprocess=False, show_progress_on=outputs[0],
        )  # fmt: skip
        quiet: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        seed.click(lambda: random.randrange(SEED_RANGE), None, inputs["seed"], **quiet)
        inputs["model"].change(
            lambda model, guide: guides_of(session, model, guide),
            [inputs["model"], inputs["guide"]], inputs["guide"], **quiet,
        )  # fmt: skip
        inputs["guide"].change(
            lambda guide, steps: (session.steps(guide) or gr.skip(), session.refresh(guide, steps)),
            [inputs["guide"], inputs["num_inference_steps"]],
            [inputs["num_inference_steps"], inputs["refresh"]], **quiet,
        )  # fmt: skip
        gr.on(
            [dial.change for dial in counted], passes, counted, saved, show_progress="hidden",
            **quiet,
        )  # fmt: skip
    return page.queue(max_size=WAITING)


def passes(num_inference_steps: int, refresh: int) -> str:
    """The denoiser passes of CFG and of the guide, and what is saved, in words."""
    cfg, guided = 2 * num_inference_steps, num_inference_steps + min(refresh, num_inference_steps)
    return f"Guided: {guided} passes in place of {cfg}, {cfg - guided} saved."


def guides_of(session: Session, model: str, guide: str) -> gr.Dropdown:
    """The choice of guides for a model; the one that was chosen stays where it fits."""
    fitting = session.fitting(model)
    return gr.Dropdown(fitting, value=guide if guide in fitting else fitting[0])


def handler(session: Session) -> Callable[..., list[Any]]:
    """The function behind the page: values as they came in; images and sentences out."""

    def draw(
        model: Any, guide: Any, prompt: Any, negative_prompt: Any, guidance_scale: Any,
        refresh: Any, num_inference_steps: Any, seed: Any, progress: gr.Progress = PROGRESS,
    ) -> list[Any]:  # fmt: skip
        try:
            request = Request.of(
                model=model, guide=guide, prompt=prompt, negative_prompt=negative_prompt, seed=seed,
                guidance_scale=guidance_scale, num_inference_steps=num_inference_steps,
                refresh=refresh,
            )  # fmt: skip
            batches = session.draw(request, lambda what, i, n: progress((i, n), desc=what))
        except RequestError as error:
            raise _error(escape(str(error), quote=False)) from None
        except Exception as error:
            logging.getLogger(__name__).exception("a request failed")
            raise _error("Drawing failed; the log of the server says why.") from error
        galleries = [[enlarged(image) for image in b.images] for b in batches.values()]
        return [*galleries, speed(batches)]

    return draw


def speed(batches: Mapping[GuidanceMode, Batch]) -> str:
    """The seconds of each mode as a Markdown table, and how much faster than CFG it was."""
    cfg = batches[GuidanceMode.CFG].seconds
    rows = [
        f"| {MODES[mode]} | {batch.seconds:.2f} | {cfg / batch.seconds:.2f}× |"
        for mode, batch in batches.items()
    ]
    return "\n".join([f"| | seconds, {IMAGES} images | speed |", "|---|---:|---:|", *rows])


def serve(
    page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, *, wait: bool = True
) -> str:
    """Serve the page until it is interrupted; without ``wait``, in threads, until ``page.close()``.

    Args:
        host: the address to listen at; the default is this machine only.
        port: None takes the first that is free from 7860 on.

    Returns:
        The address of the page.

    Raises:
        OSError: the port is taken.
    """
    theme = gr.themes.Default(font=FONTS, font_mono=MONO)
    try:
        _, url, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, share=False, quiet=True,
            ssr_mode=False, run_history=False, footer_links=[], enable_monitoring=False, pwa=False,
            max_file_size="1kb", theme=theme, css=CSS,
        )  # fmt: skip
    except OSError as error:
        taken = f"port {port} of {host} is" if port else f"every port from 7860 on of {host} is"
        raise OSError(f"{taken} taken; choose another with --port") from error
    if wait:
        print(f"the app is at {url} (stop it with Ctrl-C)", flush=True)
        page.block_thread()
    return url


def _inputs(session: Session) -> dict[str, Any]:
    """The controls, in the order of the endpoint's arguments."""
    models = list(session.models)
    guides = session.fitting(models[0])
    scale = max(guide.guidance_scale_range[1] for guide in session.guides.values())
    prompt, negative = (
        gr.Textbox(value, label=label, max_length=400, elem_id=name, render=False)
        for name, label, value in (
            ("prompt", "Prompt", "owl"), ("negative-prompt", "Negative prompt", "")
        )
    )  # fmt: skip
    prompt.render()
    negative.render()
    with gr.Row():
        model = gr.Dropdown(models, value=models[0], label="Model", min_width=110, elem_id="model")
        guide = gr.Dropdown(guides, value=guides[0], label="Guide", min_width=110, elem_id="guide")
    with gr.Row():
        w = gr.Slider(
            1, scale, min(4.0, scale), step=0.1, label="Guidance scale", min_width=110,
            elem_id="guidance-scale",
        )  # fmt: skip
        refresh = gr.Slider(
            0, REFRESHES, session.refresh(guides[0], 25), step=1, label="Refresh", min_width=110,
            elem_id="refresh",
        )  # fmt: skip
    steps = gr.Slider(
        1, 100, session.steps(guides[0]) or 25, step=1, label="Steps", elem_id="steps"
    )
    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    return {
        "model": model, "guide": guide, "prompt": prompt, "negative_prompt": negative,
        "guidance_scale": w, "refresh": refresh, "num_inference_steps": steps, "seed": seed,
    }  # fmt: skip


def _outputs() -> list[Any]:
    """A gallery for each mode, and the table of seconds."""
    galleries = []
    with gr.Row():
        for mode, title in MODES.items():
            with gr.Column(min_width=160):
                gr.Markdown(f"### {title}")
                galleries.append(
                    gr.Gallery(
                        label=title, show_label=False, columns=2, height="auto", format="png",
                        object_fit="contain", interactive=False, elem_id=f"mode-{mode}",
                    )
                )  # fmt: skip
    return [*galleries, gr.Markdown(elem_id="speed")]


def _error(message: str) -> gr.Error:
    text = message[0].upper() + message[1:]
    return gr.Error(text, title="Not drawn", print_exception=False)


def enlarged(image: Image.Image) -> Image.Image:
    """An image whose longer side has at least :data:`SIDE` pixels."""
    times = -(-SIDE // max(image.size))
    width, height = (times * n for n in image.size)
    return image if times == 1 else image.resize((width, height), Image.Resampling.LANCZOS)
