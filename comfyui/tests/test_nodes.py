"""The nodes as ComfyUI loads and runs them, and the conversion of weights."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_patcher
import folder_paths
import mmdits
import nodes
import pytest
import torch
import unets
from diffusers import UNet2DConditionModel
from kinds import CPU, SIDE, Kind, on_comfyui
from pilotfish_comfyui import conditions
from pilotfish_comfyui.convert import PREFIX, ConversionError, convert, differences, main
from pilotfish_comfyui.fitting import backbone_of, prediction_type
from pilotfish_comfyui.loading import FOLDER, apply_guide, find_guides, load_guide
from pilotfish_comfyui.unet_names import Layout, to_comfyui, to_diffusers
from safetensors.torch import load_file
from unets import SD15, UNetKind

from pilotfish.backbones import Backbone
from pilotfish.guides import ExternalGuide
from pilotfish.interface import GuideError

HERE = Path(__file__).parent.parent
BASE = HERE.parent / "assets" / "pilotfish_models" / "base" / "unet" / "config.json"
WORKFLOW = json.loads((HERE / "example_workflows" / "one_pass.json").read_text())


@pytest.fixture
def guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of ComfyUI with a guide, and the nodes loaded as ComfyUI does it."""
    guide = SD15.guide()
    guide.register_to_config(refresh_ratio=0.4)
    guide.save_pretrained(tmp_path / FOLDER / "sd15-tiny")
    assert asyncio.run(nodes.load_custom_node(str(HERE)))
    (models,), _ = folder_paths.folder_names_and_paths[FOLDER]
    assert Path(models) == Path(folder_paths.models_dir) / FOLDER
    place = [str(tmp_path / FOLDER)], set[str]()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, FOLDER, place)
    return tmp_path


class Stand:
    """For checkpoint, text encoder and decoder."""

    def load(self, ckpt_name: str) -> tuple[Any, ...]:
        return SD15.model(), self, self

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> Any:
        return SD15.prompt(len(text)).conditioning()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.movedim(1, -1)

    def save(self, images: Any, filename_prefix: str) -> tuple[Any]:
        return (images,)


def run(workflow: dict[str, Any], changes: dict[str, list[Any]]) -> Any:
    """Run a workflow node by node, and return what its last node was given."""
    made: dict[int, Any] = {}
    stand = Stand()
    replaced = {"CheckpointLoaderSimple": stand.load, "SaveImage": stand.save}
    for node in sorted(workflow["nodes"], key=lambda node: node["order"]):
        kind = nodes.NODE_CLASS_MAPPINGS[node["type"]]
        types = {k: v for group in kind.INPUT_TYPES().values() for k, v in group.items()}
        given = {}
        for place in node["inputs"]:
            (link,) = (each for each in workflow["links"] if each[0] == place["link"])
            assert link[3] == node["id"]
            assert link[5] == place["type"] == types[place["name"]][0]
            given[place["name"]] = made[link[1]][link[2]]
        values = list(changes.get(node["type"], node["widgets_values"]))
        for name in [name for name in types if name not in given and name not in ("prompt",)]:
            if name in ("extra_pnginfo",):
                continue
            given[name] = values.pop(0)
            if name == "seed":
                values.pop(0)  # what the page does with it afterwards
        assert not values, node["type"]
        function = replaced.get(node["type"]) or getattr(kind(), kind.FUNCTION)
        with torch.inference_mode():
            made[node["id"]] = function(**given)
    return made[workflow["last_node_id"]][0]


def test_the_example_workflow_runs(guides: Path) -> None:
    size = {"EmptyLatentImage": [8 * SIDE, 8 * SIDE, 2]}
    size["KSampler"] = [7, "fixed", 5, 7.5, "euler", "normal", 1.0]
    made = run(WORKFLOW, size)
    assert made.shape == (2, SIDE, SIDE, 4)
    assert torch.isfinite(made).all()
    assert torch.equal(run(WORKFLOW, size), made)
    assert not torch.equal(run(WORKFLOW, size | {"PilotfishApplyGuide": [0]}), made)
    # the guide names 0.4 of 5 steps
    assert torch.equal(run(WORKFLOW, size | {"PilotfishApplyGuide": [2]}), made)


def test_the_list_holds_folders(guides: Path) -> None:
    (guides / FOLDER / "empty").mkdir()
    (guides / FOLDER / "owner" / "other").mkdir(parents=True)
    (guides / FOLDER / "owner" / "other" / "config.json").write_text("{}")
    assert list(find_guides([str(guides / FOLDER), "nowhere"])) == ["owner/other", "sd15-tiny"]
    found = nodes.NODE_CLASS_MAPPINGS["PilotfishLoadGuide"].INPUT_TYPES()
    assert found["required"]["guide_name"][0] == ["owner/other", "sd15-tiny"]
    with pytest.raises(GuideError):
        load_guide(guides / FOLDER / "owner" / "other")


# -- what is refused ------------------------------------------------------------------------------


def test_a_guide_of_another_type_is_refused() -> None:
    guide = ExternalGuide.for_denoiser(SD15.denoiser, "epsilon")
    with pytest.raises(GuideError, match="type tiny, not ExternalGuide"):
        apply_guide(SD15.model(), on_comfyui(guide))


def test_a_compiled_model_is_refused() -> None:
    model = SD15.model()
    model.add_wrapper_with_key("apply_model", "torch.compile", lambda executor, *args: None)
    with pytest.raises(GuideError, match=r"torch\.compile does not go with a guide"):
        apply_guide(model, on_comfyui(SD15.guide()))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"gligen": ()}, "GLIGEN"),
        ({"default": True}, "default conditionings"),
        ({"hooks": object()}, "LoRAs of their own"),
    ],
)
def test_conditionings_of_other_kinds_are_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(GuideError, match=words):
        conditions.check([{"model_conds": {}} | entry], [{"model_conds": {}}])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, "takes no guide; epsilon, v and flow do")
          for kind in ("EDM", "V_PREDICTION_EDM", "FLUX")),
        ("FLOW", "prediction_type: guide epsilon, denoiser flow"),
    ],
)  # fmt: skip
def test_other_noise_paths_are_refused(kind: str, words: str) -> None:
    config = SD15.loaded.model.model_config
    sampling = comfy.model_base.model_sampling(config, comfy.model_base.ModelType[kind])
    model = SD15.model()
    model.add_object_patch("model_sampling", sampling)
    with pytest.raises(GuideError, match=words):
        apply_guide(model, on_comfyui(SD15.guide()))


def test_another_denoiser_is_refused() -> None:
    class Transformer(torch.nn.Module):
        model_config = None

    base = torch.nn.Module()
    base.diffusion_model, base.model_sampling = Transformer(), SD15.loaded.model.model_sampling
    model = comfy.model_patcher.ModelPatcher(base, CPU, CPU)
    with pytest.raises(GuideError, match="Transformer is neither a UNet nor the transformer"):
        apply_guide(model, on_comfyui(SD15.guide()))


# -- conversion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*unets.KINDS, *mmdits.KINDS])
def test_signature_and_tensors_are_the_same(kind: Kind) -> None:
    ours, converted = kind.loaded.model, convert(kind.denoiser)
    signature = Backbone.of(kind.denoiser).signature(kind.prediction)
    assert backbone_of(ours).signature(prediction_type(ours.model_sampling)) == signature
    found = ours.diffusion_model.state_dict()
    assert converted.keys() == {PREFIX + name for name in found}
    assert all(torch.equal(converted[PREFIX + name], found[name]) for name in found)


@pytest.mark.parametrize("kind", unets.KINDS)
def test_names_there_and_back(kind: UNetKind) -> None:
    ours, theirs = kind.denoiser, kind.loaded.model.diffusion_model
    assert Layout.of_diffusers(ours) == Layout.of_comfyui(theirs)
    names = Layout.of_diffusers(ours).names()
    found = {to_comfyui(name, names): name for name in ours.state_dict()}
    assert set(found) == set(theirs.state_dict())
    assert all(to_diffusers(name, names) == back for name, back in found.items())


def test_the_command_converts_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = SD15.denoiser
    unet.save_pretrained(tmp_path / "unet")
    made = tmp_path / "made.safetensors"
    monkeypatch.setattr("sys.argv", ["convert", str(tmp_path / "unet"), str(made)])
    main()
    found, wanted = load_file(made), convert(unet)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_the_bundled_base_has_and_comfyui_has_not() -> None:
    """A text embedding that pools hidden states by attention, and 16 groups of 11 channels."""
    config = json.loads(BASE.read_text())
    assert [reason.split(" ")[0] for reason in differences(config)] == [
        "addition_embed_type='text'", "norm_num_groups=16", "block_out_channels=[176]",
    ]  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    with pytest.raises(ConversionError, match="no counterpart for addition_embed_type='text'"):
        convert(unet)
