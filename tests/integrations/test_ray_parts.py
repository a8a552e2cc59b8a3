"""What runs in processes of Ray, without Ray: decoded here, captioned there, the records are those of a plain run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.checkpoints import load_checkpoint
from video_llama.captioning import CaptionFile, Clip, CorpusSettings, RunProfile, caption_corpus
from video_llama.cli import caption
from video_llama.errors import CheckpointError, MediaError
from video_llama.inference.generation import GenerationOptions
from video_llama.integrations.ray import decoding
from video_llama.integrations.ray.captioner import Captioner, ModelSource, Part

SETTINGS = CorpusSettings(
    options=GenerationOptions(max_new_tokens=6), num_workers=0, batch_size=2, window_seconds=1.0, audio=True
)


@pytest.fixture(autouse=True)
def end_processes() -> Iterator[None]:
    yield
    decoding._process.cache_clear()


@pytest.mark.slow
def test_decoded_and_captioned_apart_the_records_are_those_of_one_process(
    tiny_checkpoint: Path, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 99)
    paths = [str(make_video("long.mp4", num_frames=30, fps=10, audio=True)), str(broken)]
    with CaptionFile(tmp_path / "plain.jsonl") as file:
        clips = [Clip(path, path) for path in paths]
        assert caption_corpus(load_checkpoint(tiny_checkpoint), clips, file, SETTINGS) == 1
    lines = map(json.loads, (tmp_path / "plain.jsonl").read_text(encoding="utf-8").splitlines())
    expected = {(line["id"], line.get("segment", 0)): line for line in lines}

    captioner = Captioner()
    arguments = {"model_path": tiny_checkpoint, "dtype": "float32"}
    loaded = captioner.load(ModelSource(arguments), SETTINGS, "cpu", 1)
    assert loaded.clips_at_once == 2
    parts, payloads = [], []
    for key, path in enumerate(paths):
        (num_windows, num_read, seconds), windows = decoding.decode(loaded.decoder, 60.0, path, 0)
        assert (num_windows, num_read) == ((3, 3), (1, 1))[key]
        assert seconds > 0
        # Windows that are done already are not wanted.
        wanted = ((0, 2), (0,))[key]
        parts.append(Part(key, path, path, 0, num_windows, wanted))
        payloads.append(windows)
    captioned = captioner.caption(parts, *payloads)
    assert {(record["id"], record.get("segment", 0)): record for _, record, _ in captioned.records} == {
        place: record for place, record in expected.items() if place != (paths[0], 1)
    }
    assert {(key, num_windows) for key, _, num_windows in captioned.records} == {(0, 3), (1, 1)}
    assert captioned.profile["captions"] == 2
    assert captioned.profile["stages"]["encode"] > 0


@pytest.mark.slow
def test_a_decoder_that_takes_too_long_is_an_error_of_its_clip(
    tiny_checkpoint: Path, make_video: Callable[..., Path]
) -> None:
    decoder = Captioner().load(ModelSource({"model_path": tiny_checkpoint}), SETTINGS, "cpu", 1).decoder
    (num_windows, num_read, _), [error] = decoding.decode(decoder, 0.0001, str(make_video()), 4)
    assert isinstance(error, MediaError)
    assert "takes too long" in str(error)
    # It is taken for the last window, so that no other one is tried.
    assert (num_windows, num_read) == (5, 1)


def test_a_model_that_is_not_there_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        Captioner().load(ModelSource({"model_path": tmp_path / "absent"}), SETTINGS, "cpu", 1)


def test_a_decoding_worker_loads_no_torch() -> None:
    code = "import sys, video_llama.integrations.ray.decoding; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_stages_of_captioners_are_added_up() -> None:
    others = []
    for number in range(2):
        record = RunProfile().to_record()
        record["stages"] = dict.fromkeys(record["stages"], 0.0) | {"wait": 1.0 + number, "encode": 6.0 - number}
        others.append(record)
    profile = RunProfile()
    profile.others = others
    record = profile.to_record()
    assert (record["stages"]["wait"], record["stages"]["encode"]) == (3.0, 11.0)
    assert record["share_of_waiting"] == 3 / 14
    assert record["seconds"] < 1, "of the run, not of the captioners together"
    assert "wait 21 %, encode 79 %" in profile.summary()


def test_a_run_on_a_cluster_is_started_once(
    make_video: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(make_video()), "--model", "absent", "--output", str(tmp_path / "out.jsonl"), "--launcher", "ray"]
    assert caption.main([*command, "--num-shards", "2"]) == 1
    assert "--launcher ray divides the work itself" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
