"""Captioning with vLLM, killed and continued; `scripts/test_engines.sh vllm` installs it.

The judge is the same command without `--engine`, in float32.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: bash scripts/test_engines.sh vllm")

from examples.tiny_world.world.corpus import WorldSettings, make_corpus
from tests.integrations.vllm_settings import SETTINGS
from video_llama import load_pretrained_model
from video_llama.cli import caption, convert
from video_llama.inference.captioning import ask_about
from video_llama.processor.clips import ClipReader, Window

pytestmark = pytest.mark.slow

MODEL = "video-llama-tiny"
SAMPLES = Path(__file__).parents[2] / "video_llama" / "demo" / "samples"
OPTIONS = ["--model", MODEL, "--dtype", "float32", "--max-new-tokens", "32"]
ENGINE = ["--engine", "vllm", "--engine-options", '{"enforce_eager": true, "max_model_len": 512}', "--batch-size", "4"]
Records = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twenty clips with and without audio, an image, audio alone, and three broken files."""
    folder = tmp_path_factory.mktemp("world")
    make_corpus(folder, WorldSettings(20, 6, 64, (0, 0, 1)))
    clips = sorted(folder.rglob("webvid/**/*.mp4"))
    content = clips[0].read_bytes()
    broken = [b"", b"no video" * 99, content[: len(content) // 2]]
    for number, damaged in enumerate(broken):
        (folder / f"broken{number}.mp4").write_bytes(damaged)
    files = [*clips, SAMPLES / "cross.jpg", SAMPLES / "tone.m4a", *sorted(folder.glob("broken*.mp4"))]
    assert len(files) == 25
    return [str(file) for file in files]


def read(path: Path) -> Records:
    """Return the records by clip and window; each must be there once, and the last line may be cut off."""
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    records = {(line["id"], line.get("segment", 0)): line for line in lines}
    assert len(records) == len(lines)
    return records


def start(inputs: list[str], output: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "video_llama", "caption", *inputs, "--output", str(output), *OPTIONS, *ENGINE]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, *options], env={**os.environ, **SETTINGS}, stdout=log, stderr=log)


def wait_for_lines(process: subprocess.Popen[bytes], output: Path, number: int) -> None:
    while len(read(output)) < number:
        assert process.poll() is None, output.with_suffix(".log").read_text()[-4000:]
        time.sleep(0.05)


def test_a_killed_and_continued_run_writes_what_the_package_itself_writes(inputs: list[str], tmp_path: Path) -> None:
    plain, output = tmp_path / "plain.jsonl", tmp_path / "captions.jsonl"
    assert caption.main([*inputs, "--output", str(plain), "--workers", "0", *OPTIONS]) == 1
    expected = read(plain)
    assert sum("error" in record for record in expected.values()) == 3
    assert {record["sound"] for record in expected.values() if "sound" in record} >= {"heard", "no sound track"}

    process = start(inputs, output)
    # More than the broken ones, so that vLLM is at work.
    wait_for_lines(process, output, 5)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    # vLLM's process and the decoders end with the command.
    assert psutil.wait_procs(processes, timeout=120)[1] == []
    begun = len(read(output))

    profile = tmp_path / "profile.json"
    process = start(inputs, output, "--resume", "--profile", str(profile))
    assert process.wait(600) == 1, output.with_suffix(".log").read_text()[-4000:]
    assert read(output) == expected
    figures = json.loads(profile.read_text())
    assert figures["captions"] + figures["errors"] == len(inputs) - begun


def test_windows_and_clips_without_their_audio_are_captioned_as_by_the_package(
    inputs: list[str], tmp_path: Path
) -> None:
    plain, output = tmp_path / "plain.jsonl", tmp_path / "captions.jsonl"
    options = ["--segment-seconds", "0.5", "--no-audio", "--num-frames", "3", "--prompt", "What moves?"]
    assert caption.main([*inputs[:4], "--output", str(plain), "--workers", "0", *OPTIONS, *options]) == 0
    process = start(inputs[:4], output, *options)
    assert process.wait(600) == 0, output.with_suffix(".log").read_text()[-4000:]
    expected = read(plain)
    assert max(number for _, number in expected) > 0
    assert {record["sound"] for record in expected.values()} == {"not listened to"}
    assert read(output) == expected


def test_the_language_model_alone_continues_embedded_prompts(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
        monkeypatch.setenv(name, value)
    from vllm import LLM, SamplingParams

    folder = tmp_path / "language-model"
    assert convert.main(["--language-model-only", "--dtype", "float32", MODEL, str(folder)]) == 0
    model = load_pretrained_model(MODEL, device="cpu", dtype="float32")
    reader = ClipReader(model.processor.media_processor)
    embedded = []
    for path in inputs[:4]:
        _, [window] = reader(path)
        assert isinstance(window, Window)
        items = [item for item in (window.audio, window.frames) if item is not None]
        conversation = ask_about(window, "What happens?", model.new_conversation())
        embedded.append(model.prepare(conversation, model.encode_batch(items)).inputs_embeds[0].clone())
    llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=512, enable_prompt_embeds=True)
    prompts: list[Any] = [{"prompt_embeds": embeds} for embeds in embedded]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    expected = model.caption(inputs[:4], "What happens?", max_new_tokens=32)
    assert [output.outputs[0].text.strip() for output in outputs] == expected
