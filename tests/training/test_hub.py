"""Pushing to the hub, with a stand-in for the hub's client that keeps what it was sent."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from qrlora.cli import main
from qrlora.errors import QrloraError
from qrlora.models import LoadedModel
from qrlora.training import TrainConfig, hub, train
from tests.training.conftest import MakeConfig


class FakeHub:
    """Who is logged in, and the repositories, as folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.fails = root, False
        self.login: dict[str, Any] = {
            "name": "me",
            "orgs": [{"name": "us"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.made: list[tuple[str, bool | None]] = []

    def __call__(self) -> "FakeHub":
        return self

    def whoami(self) -> dict[str, Any]:
        return self.login

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        assert exist_ok
        self.made.append((repo_id, private))
        return f"the-hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        if self.fails:
            raise ConnectionError("no route to the hub\nand more")
        for pattern in allow_patterns:
            for source in folder_path.glob(pattern):
                target = self.root / repo_id / source.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)

    def files(self, repo_id: str) -> list[str]:
        folder = self.root / repo_id
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    stand_in = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", stand_in)
    return stand_in


def test_the_result_its_card_and_the_cards_pictures_are_pushed(
    make_config: MakeConfig, model: LoadedModel, fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"push_to_hub": True, "hub_private_repo": True, "validation_prompt": "a <c> cat", "validation_steps": 3}
    train(make_config(**options), loaded=model)
    assert fake.made == [("me/out", True)]  # the folder's name, under one's own
    assert fake.files("me/out") == ["README.md", "adapter.safetensors", "validation/step-000006-0.png"]
    assert "load_lora_weights('me/out'" in (tmp_path / "hub" / "me" / "out" / "README.md").read_text()
    assert "pushed to the-hub/me/out" in capsys.readouterr().err
    for path in (tmp_path / "hub").rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()


def test_a_push_that_fails_loses_nothing_and_can_be_done_later(
    make_config: MakeConfig, model: LoadedModel, fake: FakeHub, tmp_path: Path
) -> None:
    expected = train(make_config(output_dir=str(tmp_path / "plain")), loaded=model, progress=False).path.read_bytes()
    config, fake.fails = make_config(push_to_hub=True, hub_model_id="us/dog"), True
    with pytest.raises(
        QrloraError,
        match=r"is finished, but was not pushed to the hub \(no route to the hub\); later: hf upload us/dog .*"
        r"--include adapter\.safetensors --include README\.md",
    ):
        train(config, loaded=model, progress=False)
    assert (tmp_path / "out" / "adapter.safetensors").read_bytes() == expected
    fake.fails = False
    train(config.model_copy(update={"resume": "latest"}), loaded=model, progress=False)
    assert fake.files("us/dog") == ["README.md", "adapter.safetensors"]


def test_the_command_ends_with_2_after_the_result_is_written(
    make_config: MakeConfig, fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.fails = True
    file = tmp_path / "config.yaml"
    file.write_text(make_config(max_train_steps=1, push_to_hub=True, adapter={"rank": 4}).to_yaml())
    assert main(["train", str(file)]) == 2
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
    assert "was not pushed to the hub (no route to the hub)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "login", "words"),
    [
        ({"hub_model_id": "them/dog"}, {}, "logged in as me, who is not them .* write me/dog"),
        ({"hub_model_id": "a b"}, {}, "hub_model_id=a b is no name of a repository"),
        ({"hub_model_id": "me/x/y"}, {}, "hub_model_id=me/x/y is no name of a repository"),
        ({}, {"auth": {"accessToken": {"role": "read"}}}, "a token that may only read"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_anything_is_loaded(
    make_config: MakeConfig, fake: FakeHub, tmp_path: Path, changes: dict[str, Any], login: dict[str, Any], words: str
) -> None:
    fake.login |= login
    config = make_config(model="no/such-model", push_to_hub=True, **changes)
    with pytest.raises(QrloraError, match=words):
        train(config, progress=False)
    assert not (tmp_path / "out").exists()


def test_nobody_logged_in_is_told_before_anything_is_loaded(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's real client, which here has neither login nor network."""
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(QrloraError, match=r"push_to_hub: the hub does not say who you are \(.*hf auth login"):
        train(make_config(model="no/such-model", push_to_hub=True), progress=False)


def test_no_token_is_taken_and_none_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(QrloraError, match="hub_token is not taken, since it would be written"):
        make_config(hub_token="secret")
    assert "hub_token" not in TrainConfig.model_fields


def test_a_models_defaults_push_nothing(
    make_config: MakeConfig, model: LoadedModel, fake: FakeHub, tmp_path: Path
) -> None:
    """Whoever made the model does not decide where pictures of its users go."""
    from dataclasses import replace

    for key, value in {"push_to_hub": True, "overwrite": True, "output_dir": "elsewhere"}.items():
        pushy = replace(model, training={**model.training, key: value})
        with pytest.raises(QrloraError, match=f"the model's training defaults set {key}, which only you may"):
            train(make_config(), loaded=pushy, progress=False)
    assert fake.made == []
    assert not (tmp_path / "out").exists()
