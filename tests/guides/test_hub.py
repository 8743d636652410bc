"""A guide on the hub: precisely what goes up, with no network anywhere near."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError

from pilotfish import cli
from pilotfish.guides import Guide, TinyGuide
from pilotfish.guides.hub import digests, published, upload
from pilotfish.interface import GuideError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass
class Hub:
    """What was asked of it."""

    made: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        (commit,) = self.commits
        return commit["files"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    seen = Hub()

    def create_repo(api: HfApi, repo_id: str, **how: Any) -> Any:
        seen.made.append((repo_id, how))
        seen.tokens.append(api.token)
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_commit(
        api: HfApi, repo_id: str, operations: list[CommitOperationAdd], **how: Any
    ) -> Any:
        files = {}
        for operation in operations:
            assert isinstance(operation, CommitOperationAdd)
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        seen.commits.append({"repo_id": repo_id, "files": files, **how})
        address = f"https://hub/{repo_id}"
        request = f"{address}/pull/1" if how["create_pr"] else None
        return SimpleNamespace(commit_url=address, pr_url=request)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return seen


@pytest.fixture
def guide(unet: Any, randomise: Any) -> TinyGuide:
    made = TinyGuide.for_denoiser(unet, "epsilon", rank=4, trained_on={"name": "owner/base"})
    return randomise(made)


@pytest.fixture
def folder(guide: TinyGuide, tmp_path: Path) -> Path:
    """A guide with its card, and with what has no business on the hub."""
    folder = tmp_path / "guide"
    guide.save_pretrained(folder)
    assert cli.main(["card", "--guide", str(folder), "--license", "mit"]) == 0
    (folder / "notes.txt").write_text("mine")
    (folder / "token").write_text("secret")
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "config.json").write_text("{}")
    (folder / "optimizer.bin").write_bytes(b"0")
    return folder


def test_the_folder_goes_up_and_nothing_else(folder: Path, hub: Hub) -> None:
    assert upload(folder, "me/guide") == "https://hub/me/guide"
    assert set(hub.files) == {"README.md", "config.json", WEIGHTS}
    assert all(content == (folder / name).read_bytes() for name, content in hub.files.items())


def test_what_the_card_links_to_goes_up_too(folder: Path, hub: Hub) -> None:
    (folder / "grid.png").write_bytes(b"png")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n![grid](grid.png) [paper](https://arxiv.org/abs/1)\n")
    upload(folder, "me/guide")
    assert set(hub.files) == {"README.md", "config.json", WEIGHTS, "grid.png"}
    (folder / "grid.png").unlink()
    with pytest.raises(GuideError, match=r"links to grid\.png, which is not there"):
        upload(folder, "me/guide")


def test_a_card_of_other_weights_is_refused(folder: Path, guide: TinyGuide, hub: Hub) -> None:
    with torch.no_grad():
        next(guide.parameters()).add_(1)
    guide.save_pretrained(folder)
    with pytest.raises(GuideError, match="was written for other weights"):
        upload(folder, "me/guide")
    assert not hub.made
    assert not hub.commits


def test_without_a_card_nothing_goes_up(folder: Path, hub: Hub) -> None:
    (folder / "README.md").unlink()
    with pytest.raises(GuideError, match=r"has no README\.md; pilotfish card"):
        upload(folder, "me/guide")
    assert not hub.made


def test_a_name_that_is_no_hub_id_is_refused(folder: Path, hub: Hub) -> None:
    with pytest.raises(HFValidationError):
        upload(folder, "me/my guide")
    assert not hub.made


def test_digests_are_those_of_the_files(folder: Path) -> None:
    weights = (folder / WEIGHTS).read_bytes()
    assert digests(folder) == {WEIGHTS: sha256(weights).hexdigest()}


def test_diffusers_habits(folder: Path, hub: Hub) -> None:
    guide = Guide.from_pretrained(folder)
    address = guide.push_to_hub(
        "mine", commit_message="Better", private=True, token="hf_x", create_pr=True
    )
    assert address == "https://hub/me/mine/pull/1"
    assert hub.made == [("mine", {"private": True, "exist_ok": True})]
    assert hub.tokens == ["hf_x"]
    (commit,) = hub.commits
    assert (commit["repo_id"], commit["commit_message"]) == ("me/mine", "Better")
    assert commit["create_pr"] is True


@pytest.mark.parametrize("half", [False, True])
def test_as_it_was_loaded_it_goes_up_as_its_folder_is(
    half: bool, guide: TinyGuide, folder: Path, hub: Hub
) -> None:
    if half:  # loaded it is in float32; the file stays what was published
        guide.half().save_pretrained(folder)
        assert cli.main(["card", "--guide", str(folder)]) == 0
    Guide.from_pretrained(folder).push_to_hub("me/guide")
    assert set(hub.files) == {"README.md", "config.json", WEIGHTS}
    assert all(content == (folder / name).read_bytes() for name, content in hub.files.items())


def test_changed_it_goes_up_with_a_card_of_its_own(folder: Path, hub: Hub) -> None:
    guide = Guide.from_pretrained(folder)
    with torch.no_grad():
        next(guide.parameters()).add_(1)
    guide.push_to_hub("me/guide")
    assert set(hub.files) == {"README.md", "config.json", WEIGHTS}
    card = hub.files["README.md"].decode()
    assert hub.files[WEIGHTS] != (folder / WEIGHTS).read_bytes()
    assert sha256(hub.files[WEIGHTS]).hexdigest() in card
    assert "No measurements are recorded." in card
    assert str(folder) not in hub.files["config.json"].decode()


def test_another_configuration_is_a_change(folder: Path, hub: Hub) -> None:
    guide = Guide.from_pretrained(folder)
    guide.register_to_config(refresh_ratio=0.2)
    guide.push_to_hub("me/guide")
    assert json.loads(hub.files["config.json"])["refresh_ratio"] == 0.2


def test_from_memory_it_goes_up_with_a_card(guide: TinyGuide, hub: Hub) -> None:
    guide.push_to_hub("me/guide")
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "pilotfish"
    assert card.data.base_model == "owner/base"
    assert 'Guide.from_pretrained("me/guide")' in card.text


def test_saving_can_push(guide: TinyGuide, tmp_path: Path, hub: Hub) -> None:
    place = tmp_path / "my-guide"
    guide.save_pretrained(place, push_to_hub=True, private=True)
    assert hub.made == [("my-guide", {"private": True, "exist_ok": True})]
    assert set(hub.files) == {"README.md", "config.json", WEIGHTS}
    assert set(hub.files) == set(published(place))


def test_the_command_says_where(folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--guide", str(folder), "--private", "--commit_message", "First"]
    assert cli.main(["card", "--push_to_hub", "me/guide", *flags]) == 0
    assert "pushed to https://hub/me/guide" in capsys.readouterr().out
    assert hub.made[0][1]["private"] is True
    assert hub.commits[0]["commit_message"] == "First"


def test_a_dry_run_lists_and_touches_nothing(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(["card", "--push_to_hub", "me/guide", "--guide", str(folder), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == published(folder)
    assert not hub.made


def test_a_broken_guide_is_not_published(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])
    assert cli.main(["card", "--push_to_hub", "me/guide", "--guide", str(folder)]) == 1
    assert "no guide could be read" in capsys.readouterr().err
    assert not hub.made


def test_offline_is_said_in_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["card", "--push_to_hub", "me/guide", "--guide", str(folder)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("pilotfish card: ")


def test_a_hub_that_cannot_be_reached_is_said_in_one_sentence(
    folder: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class ConnectError(Exception):
        """Of the HTTP library below, which is none of ours."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectError("connection refused")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert cli.main(["card", "--push_to_hub", "me/guide", "--guide", str(folder)]) == 1
    said = capsys.readouterr().err.strip()
    assert said == "pilotfish card: the hub cannot be reached: connection refused"
