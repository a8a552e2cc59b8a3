"""`video-llama info`: what is installed, and whether a folder of weights is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

import video_llama
from video_llama.checkpoints.integrity import write_checksums
from video_llama.cli import main


def test_it_names_versions_devices_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "versions:",
        f"video_llama        {video_llama.__version__}",
        "FFmpeg:",
        "devices:",
        "video-llama-tiny",
    ):
        assert line in shown


def test_a_folder_that_was_changed_is_found_out(hf_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--verify", str(hf_folder)]) == 0
    assert "there is no SHA256SUMS" in capsys.readouterr().out
    write_checksums(hf_folder)
    assert main(["info", "--verify", str(hf_folder)]) == 0
    assert "files are as their checksums say" in capsys.readouterr().out
    (hf_folder / "config.json").write_text("{}")
    assert main(["info", "--verify", str(hf_folder)]) == 1
    assert "config.json" in capsys.readouterr().out
