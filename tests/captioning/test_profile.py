"""Where the time of a run goes: pauses that the test puts into one stage must be found in that stage alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import load_checkpoint
from video_llama.captioning import CaptionFile, Clip, CorpusSettings, RunProfile, caption_corpus
from video_llama.captioning.profile import STAGES
from video_llama.cli import caption as caption_videos
from video_llama.errors import ConfigError
from video_llama.inference.engine import VideoLlama
from video_llama.inference.generation import GenerationOptions
from video_llama.processor.clips import ClipReader

PAUSE = 0.5
SETTINGS = CorpusSettings(options=GenerationOptions(max_new_tokens=3, min_new_tokens=3), num_workers=0, batch_size=2)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> VideoLlama:
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture
def clips(make_video: Callable[..., Path]) -> list[Clip]:
    paths = [make_video(f"{number}.mp4", num_frames=4, audio=True) for number in range(2)]
    return [Clip(str(path), str(path)) for path in paths]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr("video_llama.captioning.profile.time.perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_stage_within_another_counts_alone(clock: Callable[[float], None]) -> None:
    profile = RunProfile()

    def reads() -> Iterator[int]:
        clock(8)
        yield 1

    def captions() -> Iterator[int]:
        for number in profile.time_items("wait", reads()):
            with profile.stage("encode"):
                clock(4)
            clock(2)
            yield number

    clock(1)
    for _ in profile.time_items("tokens", captions()):
        clock(0.5)
        with profile.stage("write"):
            clock(0.25)
        profile.note(is_caption=True)
    record = profile.to_record()
    assert record["stages"] == {"wait": 8, "encode": 4, "prefill": 0, "tokens": 2, "write": 0.25, "other": 1.5}
    assert (record["seconds"], record["captions_per_second"]) == (15.75, 1 / 15.75)
    assert record["share_of_waiting"] == 8 / 15.75
    clock(0.25)
    assert profile.to_record()["seconds"] == 16


def test_an_error_ends_its_stage(clock: Callable[[float], None]) -> None:
    profile = RunProfile()

    def fail() -> None:
        with profile.stage("encode"):
            clock(1)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    clock(2)
    stages = profile.to_record()["stages"]
    assert (stages["encode"], stages["other"]) == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("static_cache", [False, True])
@pytest.mark.parametrize("slow", ["wait", "encode", "prefill", "tokens", "write"])
def test_a_pause_is_found_in_its_stage(
    model: VideoLlama, clips: list[Clip], slow: str, static_cache: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.perf_counter()
    file = CaptionFile(tmp_path / "out.jsonl")
    settings = replace(SETTINGS, options=replace(SETTINGS.options, static_cache=static_cache))
    profile = RunProfile()
    pauses: list[float] = []

    def pause() -> None:
        pauses.append(PAUSE)
        time.sleep(PAUSE)

    def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            pause()
            return function(*arguments, **keywords)

        return run

    whole = model.model.model
    if slow == "wait":
        monkeypatch.setattr(ClipReader, "finish", slowly(ClipReader.finish))
    elif slow == "encode":
        monkeypatch.setattr(whole.audio_branch, "forward", slowly(whole.audio_branch.forward))
    elif slow == "prefill":
        layers = whole.language_model
        forward = layers.forward

        def read(*arguments: Any, **keywords: Any) -> Any:
            if keywords["inputs_embeds"].shape[1] > 1:
                pause()
            return forward(*arguments, **keywords)

        monkeypatch.setattr(layers, "forward", read)
    elif slow == "tokens":
        # What cuts the text of an answer comes after its last token.
        monkeypatch.setattr(
            "video_llama.inference.completion.cut_at_stop", slowly(lambda text, stop_strings: text.strip())
        )
    else:
        monkeypatch.setattr(file, "write", slowly(file.write))
    caption_corpus(model, clips, file, settings, profile=profile)
    record = profile.to_record()
    assert pauses
    stages = record["stages"]
    assert stages[slow] >= sum(pauses)
    assert sum(stages.values()) == pytest.approx(record["seconds"])
    assert record["seconds"] <= time.perf_counter() - begun
    assert all(stages[name] < sum(pauses) for name in STAGES if name != slow)
    assert (record["captions"], record["errors"]) == (2, 0)
    # In this process, decoding is what it waits for.
    assert 0 < record["decode"]["seconds"] <= stages["wait"]


@pytest.mark.slow
def test_workers_decode_beside_the_model(model: VideoLlama, clips: list[Clip], tmp_path: Path) -> None:
    profile = RunProfile()
    broken = tmp_path / "bad.mp4"
    broken.write_bytes(b"no video" * 99)
    with CaptionFile(tmp_path / "out.jsonl") as file:
        clips = [*clips, Clip(str(broken), str(broken))]
        caption_corpus(model, clips, file, replace(SETTINGS, num_workers=1), profile=profile)
    record = profile.to_record()
    assert (record["captions"], record["errors"]) == (2, 1)
    assert record["decode"]["workers"] == 1
    assert record["decode"]["seconds"] > 0
    assert "decoding took" in profile.summary()
    assert not model.model.model.video_branch._forward_hooks, "nothing is left on the model"


@pytest.mark.slow
def test_the_command_says_it_in_one_line_and_writes_it(
    tiny_checkpoint: Path, clips: list[Clip], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", tiny_checkpoint, "--max-new-tokens", 4, "--dtype", "float32", "--workers", 0]
    written = tmp_path / "new" / "profile.json"
    command = [*(clip.id for clip in clips), *options, "--output", tmp_path / "out.jsonl", "--profile", written]
    assert caption_videos.main([str(word) for word in command]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "captions/s" in line]
    record = json.loads(written.read_text(encoding="utf-8"))
    assert record["captions"] == 2
    assert list(record["stages"]) == list(STAGES)
    assert sum(record["stages"].values()) == pytest.approx(record["seconds"])
    assert f"{record['share_of_waiting']:.0%}".rstrip("%") in line
    command = [*(clip.id for clip in clips), *options, "--output", tmp_path / "parts.jsonl", "--profile", written]
    assert caption_videos.main([str(word) for word in [*command, "--num-shards", 2, "--shard-id", 1]]) == 0
    assert json.loads((tmp_path / "new/profile-00001-of-00002.json").read_text(encoding="utf-8"))["captions"] == 1


def test_a_profile_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the profile cannot be written"):
        RunProfile().save(tmp_path / "absent" / "profile.json")
