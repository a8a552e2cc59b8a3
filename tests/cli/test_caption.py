"""What `video-llama caption` says: what it leaves out, which model answers, how many clips have captions or fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from video_llama.cli import main

SAMPLES = Path(__file__).parents[2] / "video_llama" / "demo" / "samples"
Caption = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("stars.mp4", "cross.jpg", "tone.m4a"):
        shutil.copy(SAMPLES / name, clips)
    (clips / "notes.txt").write_text("no clip")
    return clips


@pytest.fixture
def caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caption:
    """Run the command with the small model; returns the status and what it said, without progress."""

    def run(*arguments: Path | str, model: str = "video-llama-tiny") -> tuple[int, list[str]]:
        options = ["--model", model, "--output", str(tmp_path / "out.jsonl"), "--workers", "0", "--max-new-tokens", "4"]
        status = main(["caption", *map(str, arguments), *options, "--device", "cpu"])
        shown = capsys.readouterr()
        assert shown.out == ""
        return status, [line for line in shown.err.splitlines() if line and "%|" not in line]

    return run


def test_a_run_says_what_it_leaves_out_which_model_answers_and_how_many_captions_there_are(
    caption: Caption, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    status, [left_out, begin, model, times, end] = caption(folder)
    assert status == 0
    assert left_out.startswith("left out of folders and patterns: 1 image, 1 other file, 1 audio file (")
    assert begin == f"1 clip, 0 done before, to {output}"
    assert model.startswith("model: video-llama-tiny, 5.4 M parameters, float32, frames and audio on cpu (")
    assert "captions/s" in times
    assert end == f"1 clip captioned, in {output}"
    assert caption(folder, "--resume") == (0, [left_out, f"1 clip, 1 done before, to {output}", end])


def test_the_first_clips_that_fail_are_named_with_the_reason_and_all_are_counted(
    caption: Caption, folder: Path, tmp_path: Path
) -> None:
    for number in range(5):
        (folder / f"bad{number}.mp4").write_bytes(b"no video" * 99)
    listed = tmp_path / "list.txt"
    listed.write_text("absent.mp4\nclips/stars.mp4\n" + "".join(f"clips/bad{number}.mp4\n" for number in range(5)))
    status, lines = caption(listed)
    output = tmp_path / "out.jsonl"
    reasons = {
        line["id"]: line["error"] for line in map(json.loads, output.read_text().splitlines()) if "error" in line
    }
    assert status == 1
    assert len(reasons) == 6
    assert reasons["absent.mp4"] == "no such file"
    first = [f"  {name}: {reasons[name]}" for name in ("absent.mp4", f"{folder}/bad0.mp4", f"{folder}/bad1.mp4")]
    assert lines[-6:-1] == ["6 of 7 clips could not be captioned:", *first, "  and 3 more"]
    assert lines[-1].startswith(f"1 clip captioned, in {output}; the others have an error there")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent/"], "absent/: no such file or folder"),
        (["absent.mp4"], "absent.mp4: no such file or folder"),
        (["empty"], "empty: no videos in this folder"),
        (["*.mp4"], "*.mp4: no file matches this pattern"),
    ],
)
def test_an_input_that_names_nothing_is_one_line_before_the_model_is_loaded(
    arguments: list[str], message: str, caption: Caption, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    status, [line] = caption(*arguments, model="this/is-not-even-looked-for")
    assert (status, line[: 7 + len(message)]) == (1, f"error: {message}")
    assert not (tmp_path / "out.jsonl").exists()
