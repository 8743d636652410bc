"""What the project carries: it loads with stock libraries, whole, and within its bounds."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from pilotfish import bundled
from pilotfish.data.images import load_images
from pilotfish.pipelines.loading import take_ddim_steps
from pilotfish.training.material import Material
from recipe.cards import ARTISTS, PRACTICE

WEIGHTS = sorted(bundled.FOLDER.rglob("*.safetensors"))


def test_weights_are_small_halves() -> None:
    assert sum(p.stat().st_size for p in WEIGHTS) <= 60e6
    for path in WEIGHTS:
        kinds = {v.dtype for v in load_file(path).values() if v.is_floating_point()}
        assert kinds == {torch.float16}, path
    assert not [*bundled.FOLDER.rglob("*.bin"), *bundled.FOLDER.rglob("*.p*kl*")]


MODELS = {
    "base": ARTISTS, "fluent": ("fluent",), "twemoji": ("twemoji",),
    "emojione-lora": ("emojione",), "scorer": ARTISTS,
    **{f"train_finetunes/{name}": (name,) for name in PRACTICE},
    **{f"train_finetunes/{name}": ("noto",) for name in ("contours", "flat", "lit")},
    **{f"guides/{name}": ("noto", *PRACTICE) for name in ("tiny", "tiny-16", "tiny-8", "tiny-4")},
}  # fmt: skip


@pytest.mark.parametrize("folder", MODELS)
def test_every_model_has_a_card_with_its_sources(folder: str) -> None:
    card = (bundled.FOLDER / folder / "README.md").read_text()
    assert card.startswith("---\nlicense: ")
    for style in MODELS[folder]:
        assert all(fact in card for fact in (ARTISTS | PRACTICE)[style])


def test_nothing_names_the_machine_that_made_it() -> None:
    for config in bundled.FOLDER.rglob("*.json"):
        assert '"/' not in config.read_text() or config.name.startswith("token"), config


def test_every_model_is_known() -> None:
    assert all(any(p.is_relative_to(bundled.FOLDER / m) for m in MODELS) for p in WEIGHTS)


def test_what_guides_practise_on_is_none_of_the_hosts() -> None:
    pipe = bundled.load_model("base")
    names = bundled.train_finetune_names()
    assert {f"train_finetunes/{name}" for name in names} <= MODELS.keys()
    assert not {*names} & {*bundled.MODELS, *bundled.MODELS.values()}
    material = Material(pipe, ["owl"], ["cat"])
    tuned = material.fine_tunes(names)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    for name, weights in zip(names, tuned, strict=True):
        changed = [k for k, v in weights.items() if not torch.equal(v, before[k])]
        assert len(changed) > 20, name
        assert all(v.isfinite().all() for v in weights.values())
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())


def test_the_base_needs_nothing_of_ours() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(bundled.BASE)
    made = pipe("owl", num_inference_steps=2, output_type="pt").images
    assert made.shape == (1, 3, 64, 64)
    assert made.isfinite().all()


@pytest.mark.parametrize("name", bundled.MODELS)
def test_a_host_loads_whole(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        pipe = bundled.load_model(name)
    tensors = pipe.unet.state_dict()
    for file in (bundled.FOLDER / name / "unet").glob("*.safetensors"):
        assert set(load_file(file)) == set(tensors)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in tensors.values())
    for file in (bundled.FOLDER / f"{name}-lora").glob("*.safetensors"):
        adapters = {k: v for k, v in tensors.items() if "lora_" in k}
        assert len(load_file(file)) == len(adapters)
        assert all(v.abs().sum() > 0 for v in adapters.values())


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(ValueError, match="no bundled model 'openmoji'; there are base"):
        bundled.load_model("openmoji")


def test_hosts_differ_in_style() -> None:
    first = {n: bundled.load_model(n).unet.conv_in.weight for n in ("base", "fluent", "twemoji")}
    assert not torch.equal(first["base"], first["fluent"])
    assert not torch.equal(first["fluent"], first["twemoji"])


@pytest.mark.parametrize("steps", [16, 8, 4])
def test_a_guide_for_few_steps_draws_with_as_many_passes(steps: int) -> None:
    guide, pipe = bundled.load_guide(f"tiny-{steps}"), bundled.load_model("fluent")
    take_ddim_steps(pipe)
    batches: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    with warnings.catch_warnings(), guide.attached(pipe):
        warnings.simplefilter("error", UserWarning)
        made = pipe(
            ["owl", "cactus"], guidance_scale=4, num_inference_steps=steps, output_type="pt"
        ).images
    assert batches == [2] * steps
    assert made.isfinite().all()


@pytest.mark.parametrize("kind", bundled.guide_names())
def test_every_guide_is_tiny_and_fits_every_host(kind: str) -> None:
    guide = bundled.load_guide(kind)
    for name in bundled.MODELS:
        pipe = bundled.load_model(name)
        with guide.attached(pipe):
            pass
        if name == "base":
            whole = sum(p.numel() for p in pipe.unet.parameters())
            assert sum(p.numel() for p in guide.parameters()) <= 0.01 * whole


def test_held_out_prompts_are_in_no_training() -> None:
    captions, training, held_out = (
        bundled.prompts(kind) for kind in ("captions", "training", "held_out")
    )
    assert not set(held_out) & (set(training) | set(captions))
    assert set(captions) <= set(training)


@pytest.mark.parametrize("name", bundled.MODELS)
def test_every_caption_is_drawn_in_every_style(name: str) -> None:
    pictures = load_images(bundled.images(name))
    assert sorted(pictures.captions) == sorted(bundled.prompts("captions"))
    assert pictures.pixels.shape[1:] == (3, 64, 64)
