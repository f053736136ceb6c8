"""The hub, without a network: what is asked for, and what a person reads when it is not there."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from prism_nemo.checkpoint.hub import PATTERNS, local_folder, prepare_upload, source_name, upload
from prism_nemo.errors import InputError, PrismError


def test_a_folder_is_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    for name in ("org/name", str(tmp_path / "org/name"), str(tmp_path / "missing"), "../x", "a/b/c", "name"):
        assert local_folder(name) == Path(name)


def test_a_hub_id_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "snapshots/0123abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    folder = local_folder(Path("org/some-model_1.5"))
    assert folder == tmp_path / "snapshots/0123abc"
    assert asked == {"name": "org/some-model_1.5", "allow_patterns": PATTERNS}
    assert source_name("org/some-model_1.5", folder) == "org/some-model_1.5@0123abc"
    assert source_name(folder, folder) == str(folder)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("config.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("consolidated.safetensors", False),
        ("pytorch_model.bin", False),
        ("training_args.pt", False),
        ("modeling_custom.py", False),
        ("requirements.txt", False),
    ],
)
def test_files_that_are_downloaded(name: str, wanted: bool) -> None:
    assert any(fnmatch.fnmatch(name, pattern) for pattern in PATTERNS) == wanted


def raising(error: Exception) -> Any:
    def call(*_: Any, **__: Any) -> None:
        raise error

    return call


class ConnectTimeout(Exception):
    """Stands for an error of the HTTP library."""


ConnectTimeout.__module__ = "httpx"


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("Cannot find the requested files\nin the cache"), OSError("no route"), ConnectTimeout()],
    ids=["offline", "network", "http library"],
)
def test_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match="org/name: no such folder, and as a Hugging Face model it could not"
    ) as caught:
        local_folder("org/name")
    assert "\n" not in str(caught.value)
    assert "network" in str(caught.value)


def test_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="org/name: no such folder"):
        local_folder("org/name")


def test_our_own_mistakes_are_not_called_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(KeyError("x")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError):
        local_folder("org/name")


def test_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    prepare_upload("org/name")
    upload(tmp_path, "org/name")
    assert calls == [
        ("org/name", {"private": True, "exist_ok": True}),
        ("upload", {"repo_id": "org/name", "folder_path": str(tmp_path)}),
    ]


def test_upload_that_fails_says_that_the_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", raising(OSError("broken pipe")))
    with pytest.raises(PrismError, match="was written, but uploading it to org/name failed: broken pipe") as caught:
        upload(tmp_path, "org/name")
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("name", ["name", "/tmp/x", "a/b/c", "org/na me", ""])
def test_a_name_that_is_no_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="expected a name such as org/name"):
        prepare_upload(name)
