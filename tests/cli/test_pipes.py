"""What happens to a command when the reader of its output ends first, as in `video-llama info | head`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "video_llama" / "demo" / "samples"
# 128 + SIGPIPE, as the shell counts a program that a closed pipe ended.
CLOSED = 141
CHECKED = """\
model: {ckpt: video-llama-tiny}
datasets: {messages: {data_type: video, build_info: {anno_dir: mine.jsonl}}}
"""


def run_without_reader(folder: Path, *arguments: str, unbuffered: str = "") -> tuple[int, str]:
    """Return the exit status and stderr of a command whose standard output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "video_llama", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
            cwd=folder,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    return ended.returncode, ended.stderr


# Output without a buffer fails at once, where nothing is left to fail at the end.
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["chat", "--help"], ["info"]], ids=" ".join)
def test_nobody_who_reads_is_no_error(arguments: list[str], unbuffered: str, tmp_path: Path) -> None:
    assert run_without_reader(tmp_path, *arguments, unbuffered=unbuffered) == (CLOSED, "")


@pytest.mark.slow
def test_a_check_that_nobody_reads_ends_quietly(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "How many corners has a cross?"},
        {"role": "assistant", "content": "Twelve."},
    ]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "mine.yaml").write_text(CHECKED)
    status, messages = run_without_reader(tmp_path, "check-data", "mine.yaml", "--workers", "0")
    assert status == CLOSED
    # Only the bars of progress.
    assert [line for line in messages.splitlines() if line.strip() and "%|" not in line] == []


@pytest.mark.slow
def test_answers_that_nobody_reads_end_the_chat_quietly(tmp_path: Path) -> None:
    questions = ["What is there?", "Which colour?"]
    status, messages = run_without_reader(tmp_path, "chat", str(SAMPLES / "cross.jpg"), *questions)
    assert status == CLOSED
    lines = messages.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["WARNING", "model"], messages


@pytest.mark.slow
def test_captions_are_written_although_nobody_reads_the_output(tmp_path: Path) -> None:
    clip = str(SAMPLES / "stars.mp4")
    options = ["--model", "video-llama-tiny", "--output", "captions.jsonl", "--workers", "0"]
    status, messages = run_without_reader(tmp_path, "caption", clip, *options)
    assert status == 0, messages
    assert messages.splitlines()[-1] == "1 clip captioned, in captions.jsonl"


@pytest.mark.slow
def test_head_takes_the_first_line_of_a_real_pipe(tmp_path: Path) -> None:
    command = f"{sys.executable} -m video_llama info | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert (shown.stdout, shown.stderr) == (b"versions:\n%d\n" % CLOSED, b"")
