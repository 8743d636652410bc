"""Settings from files: TOML, and presets for a base and a card."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.memory import TensorMemory, module_bytes
from benchmarks.parts import VAES
from benchmarks.presets import PresetsResult, decoding_bytes, room
from pilotfish.cli.settings import parse
from pilotfish.training import presets
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from tests.components import autoencoder

RESULTS = Path(__file__).parents[2] / "results" / "presets.json"


def parsed(*flags: str) -> DistillConfig:
    return parse(flags, DistillConfig, "distill", "")


def test_flags_override_a_file_and_a_file_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'output = "runs/a"\nseed = 3\npool = 128\nguidance_scale_max = 6\n[guide]\nrank = 5\n'
    )
    alone = parsed("--config", str(file))
    expected = DistillConfig(
        output="runs/a", seed=3, pool=128, guidance_scale_max=6.0, guide={"rank": 5}
    )
    assert alone == expected
    config = parsed("--preset", "sd35-8gb", "--config", str(file), "--seed", "4", "--head", "2")
    assert (config.seed, config.pool, config.base_quantization) == (4, 128, "nf4")
    assert (config.guide.rank, config.guide.head) == (5, 2)
    saved = tmp_path / "config.json"
    config.save(saved)
    assert parsed("--config", str(saved)) == config
    file.write_text("output = 3")
    with pytest.raises(ConfigError, match=r"mine\.toml: output must be a valid string, not 3"):
        parsed("--config", str(file))
    file.write_text("output = ")
    with pytest.raises(ConfigError, match=r"no configuration could be read from .*mine\.toml: "):
        parsed("--config", str(file))


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_complete_and_fits_its_card(name: str) -> None:
    first = parsed("--preset", name, "--output", "runs/a", "--prompts", "p.txt")
    assert first.pretrained_model_name_or_path
    assert first.cache_embeddings
    second = parse(("--preset", name, "--output", "a"), StepsConfig, "distill-steps", "")
    assert second.train_batch_size == first.train_batch_size
    counted, memory = PresetsResult.load(RESULTS).presets[name], room(presets.card(name))
    for key, value in counted.settings.items():
        assert key == "largest" or getattr(first, key) == value, f"{RESULTS.name} is out of date"
    assert max(counted.training, counted.preview) < memory
    assert first.offload_text_encoders or counted.text_encoders < memory


def test_presets_are_listed_and_an_unknown_one_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parsed("--list_presets")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == presets.names()
    assert lines[-1] == "z-image-80gb     Z-Image on a card of 80 GB"
    with pytest.raises(ConfigError, match=r"preset must be one of qwen-image-.*, not wan-8gb"):
        parsed("--preset", "wan-8gb", "--output", "a")


def test_an_image_is_decoded_in_the_memory_that_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(VAES, "sd15", autoencoder)
    with TensorMemory() as memory, torch.no_grad():
        vae, latents = autoencoder(), torch.zeros(1, 4, 8, 12)
        memory.peak = before = memory.current
        vae.decode(latents, return_dict=False)
    assert decoding_bytes("sd15", 16, 24) == module_bytes(vae) + memory.peak - before
