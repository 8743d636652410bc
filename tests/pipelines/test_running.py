"""How a pipeline is run: its scheduler, its guide, its precision, memory and speed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import accelerate
import diffusers
import pytest
import torch

from pilotfish import ExternalGuide, FullGuide, Guide, TinyGuide
from tests import components
from tests.pipelines import hosts
from tests.pipelines.hosts import Host
from tests.pipelines.matrix import FEATURES, pipelines

SCHEDULERS = [
    pytest.param(name, feature, id=f"{name}-{feature}")
    for feature in FEATURES
    if feature.endswith("Scheduler")
    for name in pipelines(feature)
]


def alone(name: str) -> Host:
    """A host that shares no component with others."""
    return hosts.host(name, **copy.deepcopy(hosts.shared(name)))


def is_conditional(host: Host, name: str, kind: type[Guide] = TinyGuide) -> None:
    """A fresh guide is the conditional model in one pass a step."""
    with host.batches() as plain:
        conditional = host.draw(guidance_scale=1.0)
    with hosts.guide(name, False, kind).attached(host.pipe), host.batches() as sizes:
        assert torch.equal(host.draw(), conditional)
    assert sizes == plain
    with hosts.guide(name, kind=kind).attached(host.pipe):
        assert not torch.allclose(host.draw(), conditional)


@pytest.mark.parametrize(("name", "scheduler"), SCHEDULERS)
def test_schedulers(name: str, scheduler: str) -> None:
    host = hosts.host(name)
    config = host.pipe.scheduler.config | {"skip_prk_steps": True}  # as PNDM's own has it
    host.pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    is_conditional(host, name)


@pytest.mark.parametrize("name", pipelines("ExternalGuide"))
def test_an_external_guide(name: str) -> None:
    is_conditional(hosts.host(name), name, ExternalGuide)


@pytest.mark.parametrize("name", pipelines("FullGuide"))
def test_a_full_guide(name: str) -> None:
    is_conditional(hosts.host(name), name, FullGuide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", pipelines("half precision"))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    host, guide = alone(name), hosts.guide(name)
    host.pipe.to(dtype)
    with guide.attached(host.pipe):
        assert host.draw().dtype == guide.dtype == dtype
    is_conditional(host, name)


@pytest.mark.parametrize("name", pipelines("model offload"))
def test_the_denoiser_offloaded_as_a_whole(name: str) -> None:
    host = alone(name)
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw()
        host.pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(host.draw(), guided)
    is_conditional(host, name)


@pytest.mark.parametrize("name", pipelines("sequential offload"))
def test_the_denoiser_offloaded_layer_by_layer(name: str) -> None:
    host, guide = alone(name), hosts.guide(name)
    with guide.attached(host.pipe):
        guided = host.draw()
        accelerate.cpu_offload(host.pipe.unet, torch.device("cpu"))
        assert host.pipe.unet.device.type == "meta"
        assert torch.equal(host.draw(), guided)
    assert guide.device.type == "cpu"
    is_conditional(host, name)


@pytest.mark.parametrize("name", pipelines("attention slicing"))
def test_attention_in_slices(name: str) -> None:
    host = hosts.host(name)
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw()
        host.pipe.enable_attention_slicing(1)
        torch.testing.assert_close(host.draw(), guided, atol=1e-3, rtol=1e-3)
    is_conditional(host, name)


@pytest.mark.parametrize("name", pipelines("fuse_qkv_projections"))
def test_fused_projections(name: str) -> None:
    host = hosts.host(name)
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw()
        host.pipe.fuse_qkv_projections(vae=False)
        torch.testing.assert_close(host.draw(), guided, atol=1e-3, rtol=1e-3)
    is_conditional(host, name)


@pytest.mark.parametrize("name", pipelines("FreeU"))
def test_freeu(name: str) -> None:
    host = hosts.host(name)
    host.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    is_conditional(host, name)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["attached", "compiled"])
@pytest.mark.parametrize("name", pipelines("torch.compile"))
def test_a_compiled_denoiser(name: str, first: str) -> None:
    torch.compiler.reset()
    host, guide = hosts.host(name), hosts.guide(name)
    cfg = host.draw()
    calls: list[dict[str, Any]] = [
        {}, {"guidance_scale": 2.5}, {"num_inference_steps": 3},
        {"negative_prompt": ["a cat"] * len(hosts.PROMPTS)}, {"negative_prompt": ["a cat", "red"]},
        {"prompt": ["red", "a"]},
    ]  # fmt: skip
    with guide.attached(host.pipe):
        guided = [host.draw(**call) for call in calls]
    if first == "compiled":
        host.pipe.unet = torch.compile(host.pipe.unet, backend="eager", fullgraph=True)
        torch.testing.assert_close(host.draw(), cfg)
    with guide.attached(host.pipe):
        if first == "attached":
            host.pipe.unet.compile(backend="eager", fullgraph=True)  # in place
        torch.testing.assert_close(host.draw(), guided[0])
        made = graphs()
        for call, expected in zip(calls, guided, strict=True):
            torch.testing.assert_close(host.draw(**call), expected)
        assert graphs() == made
    torch.testing.assert_close(host.draw(), cfg)


@pytest.mark.slow
@pytest.mark.parametrize("name", pipelines("compile_repeated_blocks"))
def test_a_denoiser_compiled_block_by_block(name: str) -> None:
    """Its blocks are one piece of code, and each is pushed in its own way."""
    torch.compiler.reset()
    unet = components.unet(
        addition_embed_type=None, block_out_channels=(8, 16, 16), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    torch.manual_seed(3)
    guide = TinyGuide.for_denoiser(unet, "epsilon").eval()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    host = hosts.host(name, unet=unet)
    cfg = host.draw()
    with guide.attached(host.pipe):
        guided = host.draw()
        unet.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(host.draw(), guided)
        for prompts in (["red"], ["a", "cat", "dog"]):
            host.draw(prompt=prompts)
    torch.testing.assert_close(host.draw(), cfg)


def graphs() -> int:
    """Those that torch.compile has made."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", pipelines("threads"))
def test_guided_and_plain_threads_share_a_denoiser(name: str) -> None:
    host = hosts.host(name)
    both = {"guided": host, "plain": hosts.sibling(host)}
    drawn: dict[str, torch.Tensor] = {}
    start = threading.Barrier(2)

    def work(which: str) -> None:
        start.wait()
        drawn[which] = both[which].draw(num_inference_steps=6)

    with hosts.guide(name).attached(host.pipe):
        expected = {which: one.draw(num_inference_steps=6) for which, one in both.items()}
        threads: list[Any] = [threading.Thread(target=work, args=(which,)) for which in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(drawn[which], expected[which]) for which in both)
