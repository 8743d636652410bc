"""What the page answers: values as they came in, pictures and sentences out."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from pilotfish.app import request, shown
from pilotfish.app.drawing import Studio
from pilotfish.app.request import Request, RequestError
from pilotfish.evaluation.ways import WAYS

PROGRESS = gr.Progress()


class Answers:
    """The functions behind the page; the names of their arguments are those of its API.

    Each raises ``gr.Error`` with a sentence for its reader, whatever goes wrong.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def draw(
        self, host: Any, guide: Any, prompt: Any, negative_prompt: Any, seed: Any,
        num_inference_steps: Any, guidance_scale: Any, progress: gr.Progress = PROGRESS,
    ) -> list[str]:  # fmt: skip
        """Files of three pictures, what each took, and the file of all three."""
        with _in_words():
            asked = self.studio.request(
                host=host, guide=guide, prompt=prompt, negative_prompt=negative_prompt, seed=seed,
                num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            )  # fmt: skip
            drawn, w = self.studio.ways(asked, _reported(progress)), f"w {asked.guidance_scale:g}"
            return [
                *(keep(shown.picture(drawn[way].image), asked, way, w) for way in WAYS),
                *(shown.figures([drawn[way]]) for way in WAYS),
                keep(shown.grid(asked, drawn), asked, w),
            ]

    def strip(
        self, host: Any, guide: Any, prompt: Any, negative_prompt: Any, seed: Any,
        num_inference_steps: Any, scales: Any, progress: gr.Progress = PROGRESS,
    ) -> tuple[str, str]:  # fmt: skip
        """The strip as HTML, and its file."""
        with _in_words():
            asked = self.studio.request(
                host=host, guide=guide, prompt=prompt, negative_prompt=negative_prompt, seed=seed,
                num_inference_steps=num_inference_steps, guidance_scale=1,
            )  # fmt: skip
            bounds = self.studio.scale_range(asked.guide)
            several = request.scales(scales, self.studio.limits, *bounds)
            rows = self.studio.strip(asked, several, _reported(progress))
            file = keep(shown.strip_grid(several, rows), asked, "by w")
            return shown.strip(asked, several, rows), file

    def examples(self, requests: list[Request]) -> list[tuple[str, str]]:
        """Files of guided pictures, with their prompts."""
        images = self.studio.guided(requests)
        return [
            (keep(shown.picture(image), one, "example"), one.prompt)
            for image, one in zip(images, requests, strict=True)
        ]


def keep(image: Image.Image, asked: Request, *more: str) -> str:
    """The path of a PNG file of its own, where gradio serves from and clears away what is old.

    Gradio by itself names a picture after what it shows, and would write it once more while
    somebody else reads it.
    """
    folder = Path(get_upload_folder()) / secrets.token_hex(16)
    folder.mkdir(parents=True)
    path = folder / f"{shown.file_name(asked, *more)}.png"
    image.save(path)
    return str(path)


def _reported(progress: gr.Progress) -> Callable[[str, int, int], None]:
    return lambda what, done, total: progress((done, total), desc=what, unit="pictures")


@contextmanager
def _in_words() -> Iterator[None]:
    """What goes wrong, as a sentence on the page; what nobody foresaw also goes into the log."""
    try:
        yield
    except RequestError as error:
        said = str(error)
        message = escape(said[0].upper() + said[1:], quote=False)
        raise gr.Error(message, title="Not drawn", print_exception=False) from None
    except Exception as error:
        logging.getLogger(__name__).exception("a drawing failed")
        raise gr.Error(
            "Drawing failed; the log of the server says why.", title="Not drawn",
            print_exception=False,
        ) from error  # fmt: skip
