"""A picture of the example workflow in ComfyUI's own page, for the documents.

    COMFYUI_PATH=/path/to/ComfyUI python comfyui/screenshot.py docs/images/comfyui.png

Run it in a clone of Pilotfish, in an environment in which ComfyUI starts, with ``playwright`` and
the system's Chromium. ComfyUI runs on the CPU, in a folder of its own that is removed afterwards.
No model is loaded: files of these names are enough for the page.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Page, ViewportSize

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "src")]
from recipe.screenshots import COLOURS, chromium  # noqa: E402

WORKFLOW = HERE / "example_workflows" / "one_pass.json"
MODELS = (
    "checkpoints/v1-5-pruned-emaonly.safetensors",
    "pilotfish_guides/sd15-tiny/config.json",
)  # fmt: skip
"""Those that the workflow names."""
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Workflow.WorkflowTabsPosition": "Sidebar",
}
"""What the page would show on its first visit, and what would lie over the graph, is turned off."""
VIEWPORT: ViewportSize = {"width": 1440, "height": 580}
TITLE = 60
"""Height of a node's title and badge."""
SECONDS = 600


@contextmanager
def server(tree: Path, further: list[str]) -> Iterator[str]:
    """ComfyUI with the nodes of this folder and the files of :data:`MODELS`, at a free port; the
    address of its page.

    Args:
        tree: of ComfyUI.
        further: folders with packages that it needs.

    Raises:
        RuntimeError: it ended, or did not answer in :data:`SECONDS`.
    """
    with TemporaryDirectory() as folder:
        base = Path(folder)
        for name in MODELS:
            file = base / "models" / name
            file.parent.mkdir(parents=True)
            file.touch()
        user = base / "user" / "default"
        user.mkdir(parents=True)
        (user / "comfy.settings.json").write_text(json.dumps(SETTINGS))
        (base / "custom_nodes").mkdir()
        (base / "custom_nodes" / "pilotfish").symlink_to(HERE)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", folder,
            "--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:",
        ]  # fmt: skip
        paths = [*further, str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        process = subprocess.Popen(command, cwd=tree, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url).close()
        except urllib.error.URLError:
            time.sleep(1)
        else:
            return
    raise RuntimeError("ComfyUI did not start; its own messages are above")


def take_picture(page: Page, url: str) -> Image.Image:
    """The workflow as the page shows it.

    Raises:
        RuntimeError: ComfyUI lacks one of its nodes.
    """
    page.set_default_timeout(1000 * SECONDS)
    page.goto(url)
    page.wait_for_function("window.app?.graph && window.app?.extensionManager")
    page.locator(".p-progress-spinner").wait_for(state="hidden")
    workflow = json.loads(WORKFLOW.read_text())
    load = "([graph, name]) => window.app.loadGraphData(graph, true, true, name)"
    page.evaluate(load, [workflow, WORKFLOW.stem])
    count = len(workflow["nodes"])
    page.wait_for_function(f"window.app.graph.nodes.length === {count}")
    if page.evaluate("window.app.graph.nodes.some(node => node.has_errors)"):
        raise RuntimeError("a node of the workflow is missing; ComfyUI's own messages are above")
    left, top = (min(node["pos"][i] for node in workflow["nodes"]) for i in (0, 1))
    right, bottom = (
        max(node["pos"][i] + node["size"][i] for node in workflow["nodes"]) for i in (0, 1)
    )
    bounds = [left, top - TITLE, right - left, bottom - top + TITLE]
    fit = "bounds => window.app.canvas.ds.fitToBounds(bounds, {zoom: 0.92})"
    page.evaluate(fit, bounds)
    page.evaluate("window.app.canvas.setDirty(true, true)")
    page.wait_for_timeout(3000)  # until nothing moves
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def main() -> None:
    """The command line."""
    tree, *further = os.environ["COMFYUI_PATH"].split(os.pathsep)
    target = Path(sys.argv[1])
    with server(Path(tree), further) as url, chromium() as browser:
        image = take_picture(browser.new_page(viewport=VIEWPORT, device_scale_factor=1.25), url)
    image.quantize(COLOURS, method=Image.Quantize.FASTOCTREE).save(target, optimize=True)
    print(f"saved {target}, {target.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
