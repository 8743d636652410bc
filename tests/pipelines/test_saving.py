"""A guided pipeline saved, turned into another, given another denoiser."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from safetensors.torch import load_file

from pilotfish import GuideError
from pilotfish.pipelines.loading import sibling
from tests import components
from tests.pipelines import hosts
from tests.pipelines.hosts import SIDE, Host
from tests.pipelines.matrix import pipelines


@pytest.mark.parametrize("name", pipelines("save_pretrained"))
def test_nothing_of_the_guide_is_saved(name: str, tmp_path: Path) -> None:
    host = hosts.host(name)
    cfg = host.draw()
    with hosts.guide(name).attached(host.pipe):
        host.draw()
        host.pipe.save_pretrained(tmp_path)
    assert "pilotfish" not in (tmp_path / "model_index.json").read_text().lower()
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(saved) == set(host.pipe.unet.state_dict())
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] is None
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(host.pipe)
    again.set_progress_bar_config(disable=True)
    drawn = Host(again, host.shown, host.call).draw()
    torch.testing.assert_close(drawn, cfg, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", pipelines("from_pipe"))
def test_another_pipeline_from_a_guided_one_does_cfg(name: str) -> None:
    host = hosts.host(name)
    picture = {"image": torch.rand(2, 3, SIDE, SIDE)}
    with hosts.guide(name).attached(host.pipe):
        pipe = AutoPipelineForImage2Image.from_pipe(host.pipe)
        pipe.set_progress_bar_config(disable=True)
        with host.batches() as sizes:
            Host(pipe, picture, {"strength": 1.0}).draw()
    assert sizes == [4, 4]


@pytest.mark.parametrize("copied", [copy, deepcopy, sibling])
@pytest.mark.parametrize("name", ["SD", "SDXL"])
def test_a_copy_of_a_guided_pipeline_does_cfg(name: str, copied: Callable[[Any], Any]) -> None:
    host, guide = hosts.host(name), hosts.guide(name)
    cfg = host.draw()
    with guide.attached(host.pipe):
        guided = host.draw()
        pipe = copied(host.pipe)
        pipe.set_progress_bar_config(disable=True)
        other = Host(pipe, host.shown, host.call)
        assert type(pipe).__mro__ == type(hosts.host(name).pipe).__mro__
        assert torch.equal(other.draw(), cfg)
        assert torch.equal(host.draw(), guided)
        with guide.attached(pipe):  # and it takes the guide once, whatever it was copied with
            assert torch.equal(other.draw(), guided)
        assert torch.equal(other.draw(), cfg)
    assert torch.equal(host.draw(), cfg)


@pytest.mark.parametrize("name", ["SD", "SDXL"])
def test_a_copied_denoiser_takes_the_guide_once(name: str) -> None:
    host, guide = hosts.host(name), hosts.guide(name)
    with guide.attached(host.pipe):
        guided = host.draw()
        other = hosts.host(name, unet=deepcopy(host.pipe.unet))
        with guide.attached(other.pipe):
            assert torch.equal(other.draw(), guided)


@pytest.mark.parametrize("name", pipelines("another denoiser"))
def test_another_denoiser_under_the_guide(name: str) -> None:
    host, other = hosts.host(name), hosts.host(name)
    torch.manual_seed(13)
    with torch.no_grad():
        for parameter in other.pipe.unet.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    guide = hosts.guide(name)
    with guide.attached(other.pipe):
        expected = other.draw()
    with guide.attached(host.pipe):
        assert not torch.allclose(host.draw(), expected)
        host.pipe.unet = other.pipe.unet
        assert torch.equal(host.draw(), expected)
        host.pipe.unet = components.unet(block_out_channels=(8, 32))
        with pytest.raises(GuideError, match="block_out_channels"):
            host.draw()
