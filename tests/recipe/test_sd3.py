"""The recipe's Stable Diffusion 3: a stock folder, and its zero tokens act as they should."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from pilotfish import bundled
from recipe import finetunes, sd3
from recipe.loop import train

SHORT = replace(sd3.STAGE, steps=1, batch=2, views=1, final_views=1)
IMAGES = bundled.FOLDER / "images"


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    """Compilation would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda module, **_: module)
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Stable Diffusion 3 of one training step."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd3, "STAGE", SHORT)
        sd3.make_sd3(bundled.BASE, IMAGES, folder / "work", folder / "sd3", bf16=False)
    return folder


def test_a_trained_folder_loads_and_draws_with_diffusers_alone(
    target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = DiffusionPipeline.from_pretrained(target / "sd3")
    assert isinstance(pipe, StableDiffusion3Pipeline)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red owl with many words", num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 64, 64, 3)
    assert "truncated" not in caplog.text
    for tokens in (1, 256):
        embeds = pipe.encode_prompt("owl", None, None, max_sequence_length=tokens)[0]
        assert embeds.shape == (1, 16 + tokens, 192)
        assert not embeds[:, 16:].any()
        assert embeds[:, :16].any()


@pytest.mark.parametrize(("style", "rank"), [("fluent", 0), ("emojione", 2)])
def test_a_fine_tune_is_loaded_by_diffusers(
    style: str, rank: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(finetunes.STYLES["sd3"][style], steps=2, batch=2, views=1, rank=rank)
    monkeypatch.setitem(finetunes.STYLES["sd3"], style, stage)
    monkeypatch.setattr(finetunes, "SD3_STAGE", SHORT)
    finetunes.make_finetune(style, IMAGES, target, target / "work", bf16=False, base="sd3")
    folder = finetunes.finetune_folder(target, style, "sd3")
    pipe = DiffusionPipeline.from_pretrained(target / "sd3")
    before = pipe.transformer.proj_out.weight.clone()
    if rank:
        assert folder.name == "sd3-emojione-lora"
        pipe.load_lora_weights(folder)
        pipe.fuse_lora()
    else:
        assert folder.name == "sd3-fluent"
        pipe.transformer = type(pipe.transformer).from_pretrained(folder / "transformer")
    assert not torch.equal(pipe.transformer.state_dict()[
        "proj_out.base_layer.weight" if rank else "proj_out.weight"
    ], before)  # fmt: skip
    assert 0 < finetunes.distances(target, [style], "sd3")[style] < 0.1


def test_many_zero_tokens_act_as_one_with_a_raised_score(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    transformer, many, text = sd3.new_transformer().eval(), 256, torch.randn(1, 16, 192)
    call = {"pooled_projections": torch.randn(1, 192), "timestep": torch.tensor([500.0])}
    latents, attention = torch.randn(1, 8, 8, 8), F.scaled_dot_product_attention

    def raised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: object) -> torch.Tensor:
        score = q.new_zeros(1, k.shape[2])
        score[:, -1] = math.log(many)
        return attention(q, k, v, attn_mask=score)

    with torch.no_grad():
        plain, every = (
            transformer(latents, F.pad(text, (0, 0, 0, n)), **call).sample for n in (1, many)
        )
        monkeypatch.setattr(F, "scaled_dot_product_attention", raised)
        one = transformer(latents, F.pad(text, (0, 0, 0, 1)), **call).sample
    torch.testing.assert_close(one, every, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, every, rtol=1e-4, atol=1e-5)


def test_a_module_has_its_own_learning_rate(tmp_path: Path) -> None:
    modules = {name: torch.nn.Linear(1, 1, bias=False) for name in ("fast", "slow")}
    before = {name: module.weight.item() for name, module in modules.items()}
    train(
        tmp_path, modules, lambda step, generator: sum(m.weight.sum() for m in modules.values()),
        steps=3, learning_rate={"fast": 1e-2, "slow": 1e-3}, seed=0, weight_decay=0.0,
    )  # fmt: skip
    fast, slow = (before[name] - module.weight.item() for name, module in modules.items())
    assert fast == pytest.approx(10 * slow, rel=0.01)
