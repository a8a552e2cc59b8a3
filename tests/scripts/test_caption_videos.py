"""The captioning script as a command: killed and continued, split over processes, and what its exit status says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts import caption_videos as script
from video_llama.captioning import default_workers
from video_llama.cli import caption as caption_videos

pytestmark = pytest.mark.slow

SCRIPT = Path(script.__file__)


@pytest.fixture
def folder(make_video: Callable[..., Path], tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for number in range(5):
        make_video(f"clips/{number}.mp4", num_frames=3 + 2 * number, audio=number % 2 == 0)
    return tmp_path / "clips"


def run(checkpoint: Path, output: Path, *arguments: str | Path) -> int:
    options = [
        "--model",
        checkpoint,
        "--output",
        output,
        "--max-new-tokens",
        "4",
        "--dtype",
        "float32",
        "--workers",
        "0",
    ]
    return caption_videos.main([str(argument) for argument in (*options, *arguments)])


def captions(*paths: Path) -> dict[str, str | None]:
    """By id; every id must be there once."""
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line.get("caption") for line in lines}


@pytest.fixture
def expected(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> dict[str, str | None]:
    """What an undisturbed run writes."""
    assert run(tiny_checkpoint, tmp_path / "undisturbed.jsonl", folder) == 0
    return captions(tmp_path / "undisturbed.jsonl")


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        caption_videos.main(["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    options = "--output --prompt --batch-size --workers --resume --num-shards --shard-id --audio --no-audio"
    for option in [*options.split(), "--segment-seconds", "--max-new-tokens", "--model", "torchrun"]:
        assert option in shown, option


def test_the_exit_status_says_whether_all_were_captioned(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder, "--batch-size", "2") == 0
    (folder / "bad.mp4").write_bytes(b"no video" * 99)
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder, "--resume") == 1
    assert "1 of 6 clips could not be captioned" in capsys.readouterr().err
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder, "--resume") == 1, "an old error is an error still"
    assert [name for name, text in captions(tmp_path / "out.jsonl").items() if not text] == [str(folder / "bad.mp4")]
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder) == 1
    assert "error: " in capsys.readouterr().err


def test_the_prompt_and_the_sound_reach_the_model(tiny_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    clip = folder / "0.mp4"
    outputs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for output, options in zip(outputs, ([], ["--prompt", "Who is there, and why?"], ["--no-audio"]), strict=True):
        assert run(tiny_checkpoint, output, clip, *options, "--max-new-tokens", "20") == 0
    texts = [captions(output)[str(clip)] for output in outputs]
    assert len(set(texts)) == 3
    assert json.loads(outputs[2].read_text())["sound"] == "not listened to"


def test_a_killed_run_goes_on_with_nothing_lost_or_doubled(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, expected: dict[str, str | None]
) -> None:
    output = tmp_path / "out.jsonl"
    slow = (  # the test kills it in the middle, wherever that is
        "import sys, time; from video_llama.cli import caption; from video_llama.captioning.records import CaptionFile;"
        "write = CaptionFile.write;"
        "CaptionFile.write = lambda self, record: (write(self, record), time.sleep(0.3))[0];"
        "sys.exit(caption.main(sys.argv[1:]))"
    )
    options = ["--model", tiny_checkpoint, "--output", output, "--max-new-tokens", "4", "--dtype", "float32"]
    command = [sys.executable, "-c", slow, folder, *options, "--workers", "2", "--batch-size", "1", "--resume"]
    for at_least in (1, 3):
        process = subprocess.Popen([str(word) for word in command], cwd=SCRIPT.parents[1], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if output.exists() and output.read_bytes().count(b"\n") >= at_least:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with output.open("ab") as file:
            file.write(b'{"id": "' + bytes(str(folder), "utf-8"))  # as a kill in the middle of writing would leave it
    assert 3 <= output.read_bytes().count(b"\n") < 5
    assert run(tiny_checkpoint, output, folder, "--resume") == 0
    assert captions(output) == expected


def test_a_second_run_on_one_output_is_refused_and_a_sigterm_says_how_to_go_on(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, expected: dict[str, str | None]
) -> None:
    output = tmp_path / "out.jsonl"
    slow = (
        "import runpy, sys, time; from video_llama.captioning.records import CaptionFile; write = CaptionFile.write;"
        "CaptionFile.write = lambda self, record: (write(self, record), time.sleep(60))[0];"
        f"sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    options = ["--model", tiny_checkpoint, "--output", output, "--max-new-tokens", "4", "--dtype", "float32"]
    command = [str(word) for word in (sys.executable, "-c", slow, folder, *options, "--workers", "1", "--resume")]
    first = subprocess.Popen(command, cwd=SCRIPT.parents[1], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (output.exists() and output.read_bytes()) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    second = subprocess.run(command, cwd=SCRIPT.parents[1], stderr=subprocess.PIPE, text=True, check=False)
    assert second.returncode == 1
    assert f"error: {output}: process {first.pid} on " in second.stderr
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate()
    assert first.returncode == 143
    assert said.rstrip().endswith("terminated; continue with --resume")
    assert run(tiny_checkpoint, output, folder, "--resume") == 0
    assert captions(output) == expected


def test_parts_together_are_the_whole(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, expected: dict[str, str | None]
) -> None:
    for number in range(2):
        assert run(tiny_checkpoint, tmp_path / "c.jsonl", folder, "--num-shards", "2", "--shard-id", str(number)) == 0
    parts = sorted(tmp_path.glob("c-*.jsonl"))
    assert [part.name for part in parts] == ["c-00000-of-00002.jsonl", "c-00001-of-00002.jsonl"]
    assert [len(captions(part)) for part in parts] == [3, 2]
    assert captions(*parts) == expected


def test_processes_of_a_launcher_share_the_work(
    tiny_checkpoint: Path,
    folder: Path,
    tmp_path: Path,
    expected: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for shard in ("0", "1"):
            options = ["--num-shards", "2", "--shard-id", shard]
            assert run(tiny_checkpoint, tmp_path / "c.jsonl", folder, *options) == 0
    parts = sorted(tmp_path.glob("c-*.jsonl"))
    assert [part.name for part in parts] == [f"c-0000{number}-of-00004.jsonl" for number in range(4)]
    assert captions(*parts) == expected


def test_torchrun_splits_the_work(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, expected: dict[str, str | None]
) -> None:
    options = ["--model", tiny_checkpoint, "--output", tmp_path / "c.jsonl", "--max-new-tokens", "4", "--workers", "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command = [*launcher, SCRIPT, folder, *options, "--dtype", "float32"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert captions(*sorted(tmp_path.glob("c-*-of-00002.jsonl"))) == expected


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with four; those that were made the current one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_each_process_takes_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, four_gpus: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    assert caption_videos.device_of_process("cuda:3") == "cuda:3"  # without a launcher
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [caption_videos.device_of_process(name) for name in (None, "cuda", "cpu")] == ["cuda:2", "cuda:2", "cpu"]
    assert four_gpus == [2, 2]
    assert not caplog.records
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert caption_videos.device_of_process(None) == "cuda:0"
    assert "6 processes share 4 GPU(s)" in caplog.text


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"),
    [("cpu", 16, 1, 2), ("cuda", 16, 1, 12), ("cuda", 8, 1, 6), ("cuda", 96, 8, 10), ("cuda", 8, 8, 1)],
)
def test_a_gpu_is_given_the_cores_to_decode_for_it(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    assert default_workers(torch.device(device), processes) == workers


def test_a_run_is_not_continued_in_another_precision(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = ["--max-new-tokens", "1", "--dtype", "float32"]
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder, *begun) == 0
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder, *begun, "--resume") == 0
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder, *begun, "--resume", "--dtype", "auto") == 1
    assert "was begun with dtype 'float32', not 'auto'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("inf", "must be a finite number"),
        ("nan", "must be a finite number"),
        ("0.001", "must be at least 0.1"),
        ("-1", "must be at least 0.1"),
    ],
)
def test_a_window_has_a_length_that_makes_sense(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        run(tiny_checkpoint, tmp_path / "out.jsonl", folder, "--segment-seconds", value)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--num-shards", "2", "--shard-id", "2"], {}, "there is no shard 2 of 2"),
        ([], {"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, but WORLD_SIZE is 2"),
        ([], {"RANK": "x"}, "not to numbers"),
        (["--temperature", "-1"], {}, "temperature must be finite and not negative"),
        (["--model", "absent"], {}, "absent"),
        (["--device", "cuda:0"], {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, "would put all 4 processes on one GPU"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tiny_checkpoint: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    environment: dict[str, str],
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", folder, *arguments) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [["--segment-seconds", "0"], ["--batch-size", "0"], ["--max-new-tokens", "x"], ["--temperature", "nan"]],
)
def test_numbers_that_make_no_sense_are_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, tmp_path / "out.jsonl", "x", *arguments)
    assert caught.value.code == 2


def test_long_videos_are_captioned_in_parts(
    tiny_checkpoint: Path, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_video("long.mp4", num_frames=30, fps=5)
    assert run(tiny_checkpoint, tmp_path / "out.jsonl", path, "--segment-seconds", "2", "--num-frames", "2") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted((line["start_seconds"], line["end_seconds"]) for line in lines) == [(0, 2), (2, 4), (4, 6)]
