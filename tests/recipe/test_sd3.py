"""The recipe's Stable Diffusion 3: a stock folder, and its zero tokens act as they should."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from pilotfish import bundled
from recipe import sd3
from recipe.loop import train


def test_a_trained_folder_loads_and_draws_with_diffusers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sd3, "STAGE", replace(sd3.STAGE, steps=1, batch=2, views=1, final_views=1))
    sd3.make_sd3(
        bundled.BASE, bundled.FOLDER / "images", tmp_path / "w", tmp_path / "m", bf16=False
    )
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "m")
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
