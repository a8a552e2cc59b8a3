"""Captioning on a cluster of two nodes whose processes are killed; `scripts/test_engines.sh ray` installs Ray.

The judge is `caption_corpus`, the run in one process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: bash scripts/test_engines.sh ray")

from ray.cluster_utils import Cluster

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from tests.integrations.ray_clips import EndsCaptioner, EndsDecoder, Slow
from video_llama import load_pretrained_model
from video_llama.captioning import CaptionFile, Clip, CorpusSettings, caption_corpus, find_clips
from video_llama.inference.generation import GenerationOptions
from video_llama.integrations.ray.captioner import ModelSource
from video_llama.integrations.ray.driver import caption_on_cluster

ROOT = Path(__file__).parents[2]
MODEL = "video-llama-tiny"
SETTINGS = CorpusSettings(options=GenerationOptions(max_new_tokens=24), num_workers=0, batch_size=4)
NODE = {"num_cpus": 1, "object_store_memory": 150 * 2**20}
Records = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each; a run finds them by RAY_ADDRESS."""
    started = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    os.environ["RAY_ADDRESS"] = started.address
    yield started
    del os.environ["RAY_ADDRESS"]
    started.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 58 clips, 5 of which are broken."""
    folder = tmp_path_factory.mktemp("world")
    make_corpus(folder, WorldSettings(53, 6, 64, (0, 0, 1)))
    clips = folder / "clips"
    clips.mkdir()
    files = sorted(folder.rglob("*.mp4"))
    assert len(files) == 53
    for number, file in enumerate(files):
        file.rename(clips / f"{number:02}.mp4")
    content = (clips / "00.mp4").read_bytes()
    broken = [b"", b"no video" * 99, content[: len(content) // 2], b"\0" * 4096, b"\0" * 64 + content[64:]]
    for number, damaged in enumerate(broken):
        (clips / f"broken{number}.mp4").write_bytes(damaged)
    return clips


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """What one process writes."""
    output = tmp_path_factory.mktemp("plain") / "plain.jsonl"
    with CaptionFile(output) as file:
        assert (
            caption_corpus(load_pretrained_model(MODEL, device="cpu"), find_clips([str(corpus)]), file, SETTINGS) == 5
        )
    return read(output)


def read(path: Path) -> Records:
    """Return records by id; every id must be there once."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def kill_one(kind: str, seconds: float) -> bool:
    """Kill a process of the cluster that does this; return whether there was one in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            try:
                is_it = process.cmdline()[0].startswith(f"ray::{kind}")
            except (psutil.Error, IndexError):
                continue
            if is_it:
                process.send_signal(signal.SIGKILL)
                return True
        time.sleep(0.02)
    return False


def clip_of(path: Path, source: Callable[[str], Any] = str) -> Clip:
    return Clip(str(path), source(str(path)))


def test_a_cluster_that_loses_processes_and_a_node_loses_no_clip(
    cluster: Cluster, corpus: Path, expected: Records, tmp_path: Path
) -> None:
    second = cluster.add_node(**NODE)
    paths = sorted(corpus.iterdir())
    clips = [clip_of(path) for path in paths[1:]]
    # The decoding of the first one is what is ended from outside.
    clips.insert(0, clip_of(paths[0], Slow))
    deadly = {tmp_path / "decoder.mp4": EndsDecoder, tmp_path / "captioner.mp4": EndsCaptioner}
    for number, (path, source) in enumerate(deadly.items()):
        path.write_bytes(paths[0].read_bytes())
        clips.insert(9 + 4 * number, clip_of(path, source))
    assert len(clips) == 60
    killed: dict[str, bool] = {}
    written: list[int] = []

    def kill(kind: str) -> None:
        killed[kind] = kill_one(kind, 600)

    decoder = threading.Thread(target=kill, args=["decode"])

    def disturb(new_windows: int) -> None:
        written.append(new_windows)
        if len(written) == 12:
            kill("Captioner")
        elif len(written) == 30:
            cluster.remove_node(second, allow_graceful=False)

    decoder.start()
    output = tmp_path / "out.jsonl"
    with CaptionFile(output) as file:
        num_failed = caption_on_cluster(clips, file, SETTINGS, ModelSource({"model_path": MODEL}), disturb)
    decoder.join()
    assert killed == {"decode": True, "Captioner": True}
    assert num_failed == 7
    records = read(output)
    assert {records.pop(str(path))["error"] for path in deadly} == {
        "the process that decodes it crashes",
        "the process that captions it crashes",
    }
    assert records == expected
    assert written == [0] * 60


def test_a_driver_that_is_killed_goes_on_with_resume(
    cluster: Cluster, corpus: Path, expected: Records, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-m",
        "video_llama",
        "caption",
        str(corpus),
        "--launcher",
        "ray",
        "--output",
        str(output),
    ]
    command += ["--model", MODEL, "--max-new-tokens", "24", "--batch-size", "4", "--resume"]
    profile = tmp_path / "profile.json"
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and first.poll() is None:
        if output.exists() and output.read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    with output.open("ab") as file:
        file.write(b'{"id": "')  # as a kill in the middle of writing would leave it
    assert 8 <= output.read_bytes().count(b"\n") < 58
    second = subprocess.run(
        [*command, "--profile", str(profile)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert second.returncode == 1, second.stderr
    assert "5 of 58 clips could not be captioned" in second.stderr
    assert read(output) == expected
    record = json.loads(profile.read_text(encoding="utf-8"))
    assert 0 < record["captions"] < 53
    assert record["stages"]["encode"] > 0
    assert record["decode"]["seconds"] > 0


def test_windows_of_long_videos_are_captioned_on_a_cluster(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.mp4"
    listed = tmp_path / "list.txt"
    clips = sorted(corpus.glob("0*.mp4"))
    listed.write_text("".join(f"file '{clip}'\n" for clip in clips))
    joined = ["ffmpeg", "-v", "error", "-f", "concat", "-safe", "0", "-i", listed, "-c", "copy", long]
    subprocess.run([str(word) for word in joined], check=True)
    settings = CorpusSettings(options=SETTINGS.options, num_workers=0, batch_size=4, window_seconds=1.5)
    outputs = [tmp_path / "plain.jsonl", tmp_path / "ray.jsonl"]
    found = find_clips([str(long)])
    new: list[int] = []
    with CaptionFile(outputs[0]) as file:
        caption_corpus(load_pretrained_model(MODEL, device="cpu"), found, file, settings)
    lines = [sorted(path.read_text().splitlines()) for path in outputs[:1]]
    # More windows than one task decodes, and some of them done before.
    assert len(lines[0]) > 9
    outputs[1].write_text("".join(f"{line}\n" for line in lines[0][2:4]))
    with CaptionFile(outputs[1], resume=True) as file:
        caption_on_cluster(found, file, settings, ModelSource({"model_path": MODEL}), new.append)
    assert sorted(outputs[1].read_text().splitlines()) == lines[0]
    assert len(new) + 2 == len(lines[0])


def test_a_model_that_is_not_there_is_one_error(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "video_llama", "caption", str(corpus), "--launcher", "ray"]
    command += ["--model", str(tmp_path / "absent"), "--output", str(tmp_path / "out.jsonl")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ran.stderr
