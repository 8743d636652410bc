"""The bundled models load with stock libraries, whole, and within their bounds."""

from __future__ import annotations

import itertools
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from pilotfish import bundled
from pilotfish.backbones import Backbone
from pilotfish.cli.names import open_model
from pilotfish.data.images import load_images
from pilotfish.errors import MissingPackageError
from pilotfish.guidance_error import Trajectories, pipeline_guidance_error
from pilotfish.interface import GuideError
from pilotfish.pipelines.loading import fine_tuned_weights
from recipe.finetunes import TEST_FINETUNES
from recipe.images import STYLES, TEST_STYLES, TRAIN_STYLES

WEIGHTS = sorted(bundled.FOLDER.rglob("*.safetensors"))
SOURCES: dict[str, tuple[str, ...]] = {
    "base": tuple(STYLES), "fluent": ("fluent",), "twemoji": ("twemoji",),
    "emojione-lora": ("emojione",), bundled.STEP_LORA: ("noto",), "scorer": tuple(STYLES),
    "sd3": tuple(STYLES), "sd3-fluent": ("fluent",), "sd3-twemoji-lora": ("twemoji",),
    "sd3-emojione-lora": ("emojione",),
    **{f"train_finetunes/{of}{name}": (name,) for of in ("", "sd3-") for name in TRAIN_STYLES},
    **{
        f"train_finetunes/{of}{name}": ("noto",)
        for of in ("", "sd3-") for name in ("contours", "flat", "lit")
    },
    **{f"test_finetunes/{name}": (name,) for name in TEST_STYLES},
    **{f"guides/{name}": ("noto", *TRAIN_STYLES) for name in bundled.guide_names()},
}  # fmt: skip
UNREAD = "transformer_blocks.7.attn.add_q_proj"
"""The last block of the SD3 drops its text, so no training changes the queries of that."""


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Every model, loaded once; tests leave them as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        return {name: bundled.load_model(name) for name in bundled.STYLES}


def denoiser(pipe: Any) -> Any:
    """The UNet or transformer of a pipeline."""
    return Backbone.of_pipeline(pipe).denoiser


# --- files -------------------------------------------------------------------------------------


def test_weights_are_float16_safetensors_of_known_models() -> None:
    assert sum(p.stat().st_size for p in WEIGHTS) <= 150e6
    assert not [*bundled.FOLDER.rglob("*.bin"), *bundled.FOLDER.rglob("*.p*kl*")]
    for path in WEIGHTS:
        assert any(path.is_relative_to(bundled.FOLDER / name) for name in SOURCES), path
        with safe_open(path, "pt") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "I64"}, path


@pytest.mark.parametrize("folder", SOURCES)
def test_every_model_has_a_card_with_its_sources_and_licence(folder: str) -> None:
    card = (bundled.FOLDER / folder / "README.md").read_text()
    notice = (bundled.FOLDER.parent / "NOTICE").read_text()
    assert card.startswith("---\nlicense: ")
    for style in SOURCES[folder]:
        source = (STYLES | TRAIN_STYLES | TEST_STYLES)[style]
        assert source.attribution in card
        assert source.url in notice
        assert source.package in notice
        assert source.version in notice


def test_no_configuration_names_a_path_of_the_machine_that_made_it() -> None:
    for config in bundled.FOLDER.rglob("*.json"):
        assert '"/' not in config.read_text() or config.name.startswith("token"), config


def test_no_held_out_prompt_is_in_training() -> None:
    captions, training, held_out = (
        set(bundled.prompts(kind)) for kind in ("captions", "training", "held_out")
    )
    assert not held_out & training
    assert captions <= training


@pytest.mark.parametrize("name", bundled.MODELS)
def test_every_caption_has_an_image_in_every_style(name: str) -> None:
    images = load_images(bundled.images(name))
    assert sorted(images.captions) == sorted(bundled.prompts("captions"))
    assert images.pixels.shape[1:] == (3, 64, 64)


# --- models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bundled.BASES)
def test_a_base_works_with_stock_diffusers(name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(bundled.FOLDER / name)
    images = pipe("owl", num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)
    assert images.isfinite().all()


def test_every_version_of_transformers_can_read_the_names_of_a_text_encoder() -> None:
    files = [*bundled.FOLDER.glob("*/text_encoder*/model.safetensors")]
    read = [path for path in files if "T5" not in (path.parent / "config.json").read_text()]
    assert len(read) == 3
    for path in read:
        assert all(key.startswith(("text_model.", "text_projection.")) for key in load_file(path))


def test_a_stock_call_with_256_zero_tokens_draws_what_one_draws(models: dict[str, Any]) -> None:
    def draw(tokens: int, w: float = 4.0) -> torch.Tensor:
        images: torch.Tensor = models["sd3"](
            list(bundled.GRID_PROMPTS[:4]), guidance_scale=w, num_inference_steps=10,
            generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
            max_sequence_length=tokens, output_type="pt",
        ).images  # fmt: skip
        return images

    one = draw(1)
    distance = (draw(256) - one).square().mean()
    assert 0 < distance < 0.1 * (draw(1, w=1.0) - one).square().mean()


@pytest.mark.parametrize("name", bundled.STYLES)
def test_a_model_loads_every_tensor_of_its_files(name: str, models: dict[str, Any]) -> None:
    tensors = denoiser(models[name]).state_dict()
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in tensors.values())
    for component in ("unet", "transformer"):
        for file in (bundled.FOLDER / name / component).glob("*.safetensors"):
            assert set(load_file(file)) == set(tensors)
    for file in (bundled.FOLDER / f"{name}-lora").glob("*.safetensors"):
        adapters = {k: v for k, v in tensors.items() if "lora_" in k}
        assert len(load_file(file)) == len(adapters)
        assert all(v.abs().sum() > 0 for k, v in adapters.items() if UNREAD not in k)


@pytest.mark.parametrize("base", bundled.BASES)
def test_fine_tunes_differ_from_the_base_and_from_one_another(
    base: str, models: dict[str, Any]
) -> None:
    net = denoiser(models[base])
    found = [net.state_dict()]
    for name in [name for name in bundled.BASES[base] if name != base]:
        folder = bundled.FOLDER / name
        folder = folder if folder.is_dir() else folder.with_name(f"{name}-lora")
        found.append(fine_tuned_weights(net, folder))
    for one, other in itertools.combinations(found, 2):
        assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("base", bundled.BASES)
def test_fine_tunes_for_training_change_the_denoiser(base: str, models: dict[str, Any]) -> None:
    names = bundled.train_finetune_names(base)
    assert len(names) == 5
    assert not {*names} & {*bundled.STYLES, *bundled.STYLES.values()}
    loras = [load_file(next((bundled.TRAIN_FINETUNES / n).glob("*.safetensors"))) for n in names]
    for lora in loras:
        assert lora.keys() == loras[0].keys()
        assert all(v.isfinite().all() for v in lora.values())
        assert all(v.abs().sum() > 0 for k, v in lora.items() if UNREAD not in k)
    net = denoiser(models[base])
    before, tuned = net.state_dict(), fine_tuned_weights(net, bundled.train_finetune(names[0]))
    assert sum(not torch.equal(v, before[k]) for k, v in tuned.items()) > 20


@pytest.mark.parametrize("name", TEST_FINETUNES)
def test_a_fine_tune_for_tests_is_far_from_the_base(name: str, models: dict[str, Any]) -> None:
    unet, pipe = models["base"].unet, bundled.load_model(name)
    if TEST_FINETUNES[name].rank:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    base, tuned = unet.state_dict(), fine_tuned_weights(unet, bundled.TEST_FINETUNES / name)
    torch.testing.assert_close(dict(pipe.unet.state_dict()), dict(tuned))
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in tuned.values())
    change = sum(float((tuned[k] - v).square().sum()) for k, v in base.items())
    norm = sum(float(v.square().sum()) for v in base.values())
    assert 0.30 <= (change / norm) ** 0.5 <= 0.60


@pytest.mark.parametrize("name", bundled.guide_names())
def test_every_guide_is_tiny_and_fits_every_model_of_its_base(
    name: str, models: dict[str, Any]
) -> None:
    guide = bundled.load_guide(name)
    (base,) = (base for base in bundled.BASES if name in bundled.guide_names(base))
    assert name.startswith(bundled.guide_of(base))
    for model in bundled.BASES[base]:
        with guide.attached(models[model]):
            pass
    size = sum(p.numel() for p in denoiser(models[base]).parameters())
    assert sum(p.numel() for p in guide.parameters()) <= 0.01 * size
    (other,) = {*bundled.BASES} - {base}
    with pytest.raises(GuideError, match="made for another denoiser"):
        guide.attach(models[other])


@torch.no_grad()
def test_a_guide_works_on_a_step_lora(models: dict[str, Any]) -> None:
    def draw(pipe: Any, steps: int, w: float = 1.0) -> torch.Tensor:
        noise = [torch.Generator().manual_seed(seed) for seed in range(8)]
        latents: torch.Tensor = pipe(
            list(bundled.GRID_PROMPTS), guidance_scale=w, num_inference_steps=steps,
            generator=noise, output_type="latent",
        ).images  # fmt: skip
        return latents

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).square().mean())

    base, lora = models["base"], bundled.load_model(bundled.STEP_LORA)
    many, few, none = draw(base, 16), draw(base, 4), draw(lora, 4)
    assert distance(none, many) < 0.5 * distance(few, many)
    cfg = draw(lora, 4, 4.0)
    for refresh, most in ((0, 0.5), (1, 0.25)):
        with bundled.load_guide().attached(lora, refresh=refresh):
            assert distance(draw(lora, 4, 4.0), cfg) < most * distance(none, cfg)
    assert torch.equal(draw(lora, 4, 4.0), cfg)


# --- names -------------------------------------------------------------------------------------


def test_the_fine_tunes_for_tests_are_apart_from_the_models() -> None:
    names = bundled.test_finetune_names()
    assert names == sorted(TEST_FINETUNES)
    assert not {*names} & {*bundled.STYLES, *bundled.STYLES.values()}
    assert not {*names} & {*bundled.train_finetune_names()}
    for name in names:
        with pytest.raises(ValueError, match=f"no bundled images of '{name}'; there are those of"):
            bundled.images(name)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ValueError, match="no bundled model 'openmoji'; there are base"):
        bundled.load_model("openmoji")


def test_a_folder_takes_precedence_over_a_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundled.train_finetune("lit") == bundled.TRAIN_FINETUNES / "lit"
    bundled.load_guide("tiny-8").save_pretrained("tiny")
    Path("lit").mkdir()
    assert bundled.train_finetune("lit") == "lit"
    opened, tiny = bundled.open_guide("tiny"), bundled.open_guide("tiny-4")
    assert opened.times is not None
    assert len(opened.times) == 8
    assert tiny.times is not None
    assert len(tiny.times) == 4


def test_without_the_package_everything_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(bundled, "find_spec", missing)
    bundled._package.cache_clear()
    try:
        assert not bundled.installed()
        assert bundled.guide_names() == bundled.train_finetune_names() == []
        assert bundled.test_finetune_names() == []
        assert bundled.train_finetune("folder/of/mine") == "folder/of/mine"
        for needs in (
            bundled.load_model, bundled.load_guide, bundled.load_scorer,
            lambda: bundled.load_model("monotone"),
            lambda: bundled.open_guide("tiny"), lambda: bundled.train_finetune("lit"),
            lambda: bundled.images("base"), lambda: bundled.prompts("captions"),
            lambda: bundled.FOLDER,
        ):  # fmt: skip
            with pytest.raises(MissingPackageError, match="pip install pilotfish-models"):
                needs()
    finally:
        bundled._package.cache_clear()


ERRORS = {
    ("base", False): (0.3077809, 0.1722282), ("base", True): (0.4255043, 0.2870206),
    ("fluent", False): (0.4285745, 0.2437344), ("fluent", True): (0.493884, 0.3066286),
    ("twemoji", False): (0.4047221, 0.2266313), ("twemoji", True): (0.5237972, 0.3099052),
    ("emojione", False): (0.4592674, 0.2239326), ("emojione", True): (0.5303358, 0.2985414),
}  # fmt: skip
"""Guidance error of the bundled guide at w = 4 on eight held-out prompts and six steps, with the
null prompt and with negative prompts: without refreshes, and with two."""


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({name for name, _ in ERRORS}))
def test_the_bundled_guide_keeps_its_guidance_error(name: str, models: dict[str, Any]) -> None:
    """On the base and, with no further training, on the fine-tunes."""
    prompts, guide = bundled.prompts("held_out")[:8], bundled.load_guide()
    for negative in (False, True):
        trajectories = Trajectories.of_pipeline(
            models[name], prompts, num_inference_steps=6, guidance_scales=(4.0,), cache=True,
            negative_prompts=[*prompts[4:], *prompts[:4]] if negative else None,
        )  # fmt: skip
        errors = [
            pipeline_guidance_error(models[name], guide, trajectories, refresh=refresh).mean
            for refresh in (0, 2)
        ]
        assert errors == pytest.approx(ERRORS[name, negative], rel=1e-4)


@pytest.mark.parametrize("name", ["emojione", "high-contrast"])  # a LoRA, and a whole denoiser
def test_loaded_in_half_precision_the_weights_are_those_of_float32_cast(name: str) -> None:
    whole, half = bundled.load_model(name), open_model(name, "bfloat16")
    for part in ("unet", "vae", "text_encoder"):
        cast = getattr(whole, part).state_dict()
        for key, tensor in getattr(half, part).state_dict().items():
            assert torch.equal(tensor, cast[key].to(torch.bfloat16)), f"{part}.{key}"
            assert tensor.dtype == torch.bfloat16
