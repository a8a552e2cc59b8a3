"""The commands `download`, with a hub on this machine, and `info`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling

from tests.helpers.fake_hub import fake_hub
from video_llama import cli
from video_llama.cli.download import check_file, to_hub_id
from video_llama.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
FILES = {
    "VL_model.pth": b"vision" * 1000,
    "imagebind_huge.pth": b"audio" * 1000,
    "config.json": b"{}",
    "picture.png": b"not weights",
}


def download(address: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process: the hub's library reads the address when it is imported."""
    command = [sys.executable, "-m", "video_llama", "download", "owner/model", str(folder), *options]
    cache = str(folder.parent / "cache")
    settings = {"HF_ENDPOINT": address, "HF_HOME": cache, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_files_of_weights_are_downloaded_listed_and_compared_with_their_checksums(tmp_path: Path) -> None:
    with fake_hub() as (address, repositories):
        repositories["owner/model"] = dict(FILES)
        done = download(address, tmp_path / "all")
        assert (done.returncode, done.stderr) == (0, "")
        target = tmp_path / "all" / "model"
        weights = {name: content for name, content in FILES.items() if name != "picture.png"}
        assert {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} == weights
        assert "0.0 MB  VL_model.pth" in done.stdout
        assert "3 files of owner/model" in done.stdout
        assert f"2 checksums are right. Use it: video-llama chat clip.mp4 --model {target}" in done.stdout

        # A file that was changed since is downloaded again.
        (target / "VL_model.pth").write_bytes(b"damage" * 1000)
        assert download(address, tmp_path / "all").returncode == 0
        assert (target / "VL_model.pth").read_bytes() == FILES["VL_model.pth"]

        silent = download(address, tmp_path / "silent", "--no-audio")
        assert silent.returncode == 0
        assert not (tmp_path / "silent" / "model" / "imagebind_huge.pth").exists()


@pytest.mark.slow
def test_a_repository_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with fake_hub() as (address, _):
        done = download(address, tmp_path / "all")
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: owner/model: neither a local folder nor reachable on the Hugging Face Hub")


def test_a_file_with_another_checksum_is_named(tmp_path: Path) -> None:
    content = FILES["VL_model.pth"]
    (tmp_path / "a.pth").write_bytes(content)
    (tmp_path / "b.json").write_bytes(b"{}")
    lfs = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointer_size": 130}
    assert check_file(tmp_path, RepoSibling(rfilename="a.pth", lfs=BlobLfsInfo(**lfs)))
    assert not check_file(tmp_path, RepoSibling(rfilename="b.json"))
    (tmp_path / "a.pth").write_bytes(content[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"a\.pth: damaged .* remove it and download again"):
        check_file(tmp_path, RepoSibling(rfilename="a.pth", lfs=BlobLfsInfo(**lfs)))


def test_published_models_have_short_names() -> None:
    assert to_hub_id("Video-LLaMA-2-7B-Finetuned") == "DAMO-NLP-SG/Video-LLaMA-2-7B-Finetuned"
    assert to_hub_id("someone/else") == "someone/else"
    with pytest.raises(ConfigError, match=r"not a published model; did you mean Video-LLaMA-2-7B-Finetuned\?"):
        to_hub_id("Video-LLaMA-7B-Finetuned")


def test_info_names_versions_devices_extras_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    import av
    import torch

    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    assert [line for line in lines if not line.startswith(" ")] == [
        "versions:", "FFmpeg:", "devices:", "extras:", "weights:",
    ]  # fmt: skip
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["libavcodec"] == ".".join(map(str, av.library_versions["libavcodec"]))
    assert found["webdataset"] in ("installed", 'not installed: pip install "video_llama[train]"')
    assert found["video-llama-tiny"].endswith("video_llama/models/video-llama-tiny")
    assert "threads" in found["cpu"]
