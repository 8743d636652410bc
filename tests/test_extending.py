"""A guide and a family of denoisers of one's own: one file each, as docs/architecture.md says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from pilotfish.backbones import Backbone, DenoiserCall, Hooks
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError, TextConditions
from pilotfish.teacher import Student

ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"


class ToyDenoiser(ModelMixin, ConfigMixin):
    """The mean of the text is added to every pixel, and a convolution makes the prediction."""

    @register_to_config
    def __init__(self, in_channels: int = 3, sample_size: int = 4) -> None:
        super().__init__()
        self.text = nn.Linear(6, in_channels)
        self.out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, z: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> Any:
        return (
            self.out(z * sigma[:, None, None, None] + self.text(text.mean(1))[..., None, None]),
        )


@pytest.fixture
def family() -> Iterator[type[Backbone]]:
    class ToyBackbone(Backbone):
        family = "toy"
        denoisers = (ToyDenoiser,)
        parameters = ("z", "sigma", "text")
        num_train_timesteps = 1

        def sites(self) -> dict[str, Any]:
            head = {"module": "out", "features": 3, "channels": 3}
            return {
                "text_dim": 6, "attention": [], "modulation": [], "layers": [], "head": head
            }  # fmt: skip

        def place(self, hooks: Hooks) -> None:
            self.place_residuals(hooks)

        def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
            return DenoiserCall(given["z"], given["sigma"], TextConditions(given["text"]))

        def changed(self, guided: Any, given: Mapping[str, Any]) -> dict[str, Any]:
            return {"text": guided.extrapolated_text(given["text"])}

        def text_arguments(self, text: TextConditions, given: Any) -> Any:
            return {"text": text.embeds}

        def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
            return latents

        def __call__(
            self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
        ) -> torch.Tensor:
            return self.denoiser(latents, self.timestep(time), text.embeds)[0]

        def split_encoded(self, encoded: Any) -> Any:
            return encoded

    yield ToyBackbone
    Backbone.registry.remove(ToyBackbone)


def _inputs() -> tuple[torch.Tensor, torch.Tensor, TextConditions, TextConditions]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    time = torch.tensor([0.9, 0.3])
    return draw(2, 3, 4, 4), time, TextConditions(draw(2, 5, 6)), TextConditions(draw(1, 5, 6))


def test_a_family_of_ones_own_takes_the_tiny_guide(family: type[Backbone]) -> None:
    denoiser = ToyDenoiser().requires_grad_(False)
    guide = TinyGuide.for_denoiser(denoiser, "flow")
    student, (z, time, text, negative) = Student(guide, denoiser), _inputs()
    plain = Backbone.of(denoiser)(z, time, text)
    w = torch.tensor([4.0, 2.5])
    assert torch.equal(student(z, time, text, negative, w), plain)
    student(z, time, text, negative, w).square().mean().backward()
    moved = torch.optim.SGD(guide.parameters(), 1.0)
    moved.step()
    assert not torch.equal(student(z, time, text, negative, w), plain)
    assert torch.equal(student(z, time, text, negative, torch.ones(2)), plain)


def test_without_its_file_the_family_is_refused() -> None:
    with pytest.raises(GuideError, match="ToyDenoiser belongs to no family that takes a guide"):
        TinyGuide.for_denoiser(ToyDenoiser(), "flow")


def test_the_guide_of_the_documents_works(tmp_path: Path, pipe: Any) -> None:
    code = re.search(r"```python\n(from dataclasses.*?)```", ARCHITECTURE.read_text(), re.DOTALL)
    assert code is not None
    try:
        exec(code[1], {"__name__": __name__})
        made = Guide.registry["mine"].for_denoiser(pipe.unet, "epsilon")
        made.save_pretrained(tmp_path)
        guide = Guide.from_pretrained(tmp_path)
        plain = pipe("cat", num_inference_steps=2, guidance_scale=1.0, output_type="latent",
                     generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        with guide.attached(pipe):
            guided = pipe("cat", num_inference_steps=2, guidance_scale=4.0, output_type="latent",
                          generator=torch.Generator().manual_seed(0)).images  # fmt: skip
        assert torch.equal(guided, plain)
    finally:
        Guide.registry.pop("mine", None)
