"""Paths, hub ids and web addresses become local paths. Nothing here uses the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.error import URLError

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from video_llama.checkpoints import hub
from video_llama.checkpoints.hub import CHECKPOINT_PATTERNS, WITHOUT_AUDIO_PATTERNS, resolve_source
from video_llama.errors import CheckpointError

ADDRESS = "https://example.org/models/eva_vit_g.pth?download=true"


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Every hub download that was asked for; it "arrives" in the folder `hub`."""
    asked: list[tuple[str, Any]] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        return str(tmp_path / "hub")

    monkeypatch.setattr(hub, "snapshot_download", download)
    return asked


@pytest.fixture
def fail_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def fail(error: Exception) -> None:
        def download(*arguments: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr(hub, "snapshot_download", download)
        monkeypatch.setattr(torch.hub, "download_url_to_file", download)

    return fail


def test_a_path_is_taken_as_it_is(tmp_path: Path, downloads: list[Any]) -> None:
    (tmp_path / "x.pth").touch()
    assert resolve_source(tmp_path, "a folder") == tmp_path
    assert resolve_source(str(tmp_path / "x.pth"), "a file") == tmp_path / "x.pth"
    assert downloads == []


def test_the_home_folder_can_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve_source("~/models", "a folder") == tmp_path / "models"


def test_a_hub_id_is_downloaded_with_the_files_wanted(tmp_path: Path, downloads: list[Any]) -> None:
    assert resolve_source("DAMO-NLP-SG/Video-LLaMA-2-7B", "a model", WITHOUT_AUDIO_PATTERNS) == tmp_path / "hub"
    assert downloads == [("DAMO-NLP-SG/Video-LLaMA-2-7B", list(WITHOUT_AUDIO_PATTERNS))]
    resolve_source("DAMO-NLP-SG/Video-LLaMA-2-7B", "a model")
    assert downloads[1][1] == list(CHECKPOINT_PATTERNS)


def test_a_folder_named_like_a_hub_id_goes_before_the_hub(
    tmp_path: Path, downloads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkpoints/model").mkdir(parents=True)
    assert resolve_source("checkpoints/model", "a model") == Path("checkpoints/model")
    assert downloads == []


@pytest.mark.parametrize(
    "absent",
    ["/absent/model", "./owner/name", "one/two/three", "name", "checkpoints/VL_x.pth", "a/model.safetensors", "~/x/y"],
)
def test_an_absent_path_is_not_looked_for_at_the_hub(absent: str, downloads: list[Any]) -> None:
    path = Path(absent).expanduser()
    with pytest.raises(CheckpointError, match=f"^{path}: no such file or folder; it should be the thing wanted$"):
        resolve_source(absent, "the thing wanted")
    assert downloads == []


def assert_says_what_to_put_where(message: str) -> None:
    assert message.startswith("owner/name: neither a local folder nor reachable on the Hugging Face Hub")
    assert "Check the spelling and the connection, or download it elsewhere and give the path of its folder" in message
    assert message.endswith("it should be a folder with VL_*.pth")


class ConnectionBroken(HfHubHTTPError.__bases__[0]):  # type: ignore[misc]
    """What the HTTP library below the hub raises in the middle of a download; no OSError."""


@pytest.mark.parametrize("error", [OSError("network is unreachable\ndetails"), ConnectionBroken("peer is gone")])
def test_without_a_network_the_error_says_which_files_to_put_where(
    error: Exception, fail_with: Callable[[Exception], None]
) -> None:
    fail_with(error)
    with pytest.raises(CheckpointError) as caught:
        resolve_source("owner/name", "a folder with VL_*.pth")
    assert_says_what_to_put_where(str(caught.value))
    assert str(error).splitlines()[0] in str(caught.value)
    assert "details" not in str(caught.value)


def test_offline_the_hub_itself_leads_to_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        resolve_source("owner/name", "a folder with VL_*.pth")
    assert_says_what_to_put_where(str(caught.value))


def test_a_gated_repository_asks_to_accept_its_terms(fail_with: Callable[[Exception], None]) -> None:
    fail_with(GatedRepoError("restricted", response=Mock()))
    with pytest.raises(CheckpointError, match=r"meta/llama: a gated model: accept its licence .* `hf auth login`"):
        resolve_source("meta/llama", "a language model")


def test_an_address_is_downloaded_once_to_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(address: str, path: str) -> None:
        asked.append(address)
        Path(path).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        path = resolve_source(ADDRESS, "eva_vit_g.pth")
        assert path == tmp_path / "checkpoints" / "eva_vit_g.pth"
        assert path.read_bytes() == b"weights"
    assert asked == [ADDRESS]


def test_an_address_without_a_network_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_with: Callable[[Exception], None]
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fail_with(URLError("name resolution failed"))
    with pytest.raises(CheckpointError) as caught:
        resolve_source(ADDRESS, "eva_vit_g.pth (vit_ckpt)")
    message = str(caught.value)
    assert "name resolution failed" in message
    assert f"put it beside the other files, or into {tmp_path / 'checkpoints'}, or give its path" in message
    assert message.endswith("it should be eva_vit_g.pth (vit_ckpt)")


def test_an_address_without_a_file_is_refused() -> None:
    with pytest.raises(CheckpointError, match="names no file"):
        resolve_source("https://example.org/", "eva_vit_g.pth")
