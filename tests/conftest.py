"""Tiny seeded components in Stable Diffusion's own format; nothing here touches a network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
# threads of a tokenizer take longer to wake than a prompt takes to encode
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, one core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from pilotfish.evaluation.clip import Scorer
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
from pilotfish.noise import NoisePath
from tests import components

gc.disable()  # what is imported stays; see pytest_collection_finish

# a process that a test starts imports this tree too, wherever the environment was made
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [*(str(_ROOT / name) for name in ("src", ".", "assets")), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)

# a seed for a device that is missing would be kept, with the stack of who set it
for _name in ("cuda", "xpu", "mtia"):
    _device = getattr(torch, _name, None)
    if _device is not None and not _device.is_available():
        _device.manual_seed_all = lambda seed: None

settings.register_profile("pilotfish", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("pilotfish")

GUIDES: dict[str, type[Guide]] = {
    "tiny": TinyGuide, "external": ExternalGuide, "full": FullGuide,
}  # fmt: skip
ALL_PARTS: dict[type[Guide], dict[str, Any]] = {
    TinyGuide: {"condition_on_negative": True, "uncond_templates": 3}
}
"""The settings with which a guide has all of its parts."""


def pytest_collection_finish() -> None:
    """Leave what has been imported out of every collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., UNet2DConditionModel]:
    """A function that makes a seeded UNet; keywords change its configuration."""
    return components.unet


@pytest.fixture(scope="session")
def _pipelines() -> dict[str, StableDiffusionPipeline]:
    return {}


@pytest.fixture(params=["epsilon", "v_prediction"])
def prediction_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_pipe(
    _pipelines: dict[str, StableDiffusionPipeline],
) -> Callable[[str], StableDiffusionPipeline]:
    """A function that makes a Stable Diffusion pipeline; no two share a denoiser."""

    def make(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
        if prediction_type not in _pipelines:
            tokenizer = components.tokenizer()
            pipe = StableDiffusionPipeline(
                vae=components.autoencoder(),
                text_encoder=components.text_encoder(tokenizer),
                tokenizer=tokenizer,
                unet=components.unet(),
                scheduler=components.scheduler(prediction_type),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            _pipelines[prediction_type] = pipe
        plain = _pipelines[prediction_type].components
        pipe = StableDiffusionPipeline(
            **{
                **plain,
                "unet": components.clone(plain["unet"]),
                "text_encoder": components.clone(plain["text_encoder"]),
                "scheduler": components.scheduler(prediction_type),
            },
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(make_pipe: Callable[[str], StableDiffusionPipeline]) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline that predicts epsilon."""
    return make_pipe("epsilon")


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A UNet as the pipelines have it."""
    return components.unet()


@pytest.fixture
def schedule(prediction_type: str) -> NoisePath:
    """The noise path of the pipelines, for epsilon and for v prediction."""
    return NoisePath.of(components.scheduler(prediction_type))


@pytest.fixture(params=sorted(components.FAMILIES))
def family(request: pytest.FixtureRequest) -> components.Family:
    """Every family of denoisers."""
    return components.FAMILIES[request.param]


@pytest.fixture(params=sorted(GUIDES))
def guide_class(request: pytest.FixtureRequest) -> type[Guide]:
    """Every type of guide."""
    return GUIDES[request.param]


@pytest.fixture
def fresh(guide_class: type[Guide], unet: UNet2DConditionModel) -> Guide:
    """A guide of a UNet with all of its parts, before training."""
    torch.manual_seed(3)
    return guide_class.for_denoiser(unet, "epsilon", **ALL_PARTS.get(guide_class, {})).eval()


@pytest.fixture
def randomise() -> Callable[[Guide], Guide]:
    """A function that changes every parameter of a guide, as training would."""
    return components.randomise


@pytest.fixture
def trained(fresh: Guide, randomise: Callable[[Guide], Guide]) -> Guide:
    """A guide of a UNet whose every parameter has changed."""
    return randomise(fresh)


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """A function that runs a pipeline from fixed noise and returns the final latents."""

    def run(
        pipe: Any, prompt: str | Sequence[str] = "cat", guidance_scale: float = 4.0, **call: Any
    ) -> torch.Tensor:
        steps = {"num_inference_steps": 3, **call}
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        generator = torch.Generator().manual_seed(5)
        return pipe(
            prompt,
            guidance_scale=guidance_scale,
            output_type="latent",
            generator=generator,
            **steps,
        ).images

    return run


@pytest.fixture
def batches() -> Callable[[Any], Any]:
    """``with batches(denoiser) as sizes``: the batch size of every call of the denoiser."""

    return components.batch_sizes


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """A function that changes fields of a saved guide's configuration; None removes one."""

    def edit(folder: Path, **fields: Any) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


@pytest.fixture
def names() -> list[str]:
    return ["a", "b", "c", "d", "e", "f", "cat"]


@pytest.fixture
def clip(pipe: Any) -> tuple[CLIPModel, CLIPProcessor]:
    """A random CLIP over 16x16 images, with the pipeline's tokenizer."""
    tokenizer = pipe.tokenizer
    shared = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 12,
    }  # fmt: skip
    text = shared | {
        "vocab_size": len(tokenizer), "max_position_embeddings": 8,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = shared | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(6)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    images = CLIPImageProcessor(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16},
        do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3,
    )  # fmt: skip
    return model, CLIPProcessor(images, tokenizer)


@pytest.fixture
def scorer(clip: tuple[CLIPModel, CLIPProcessor]) -> Scorer:
    return Scorer(*clip)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A folder of captioned noise."""
    folder = tmp_path / "real"
    folder.mkdir()
    noise = np.random.default_rng(0)
    rows = []
    for i in range(6):
        pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder
