"""Processes that decode ahead: what they give, how small they are, and what becomes of those that die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.damage import damage_sound
from video_llama.data.examples import MediaSource, ShardMember
from video_llama.errors import ConfigError, MediaError
from video_llama.inference import decode_process
from video_llama.inference.workers import WindowRead, read_ahead
from video_llama.processor.clips import ClipReader, ClipSource, Window
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.transforms import normalize_pixels

MEDIA = MediaProcessor(image_size=28, num_frames=4)

REPORT = """
import json, sys
from video_llama.media.decode import ClipDecoder
from video_llama.inference.decode_process import serve
from video_llama.media.sampling import SegmentSettings
from video_llama.media.decode import num_decoder_threads
import video_llama.data.examples
decoder = ClipDecoder(28, 4, "pyav", SegmentSettings(8, "main"), True, None)
_, [window] = decoder(sys.argv[1])
heavy = ("torch", "torchaudio", "torchvision", "transformers", "decord", "webdataset", "pandas", "scipy")
loaded = [name for name in heavy if name in sys.modules]
print(json.dumps({"frames": len(window.frames), "loaded": loaded, "threads": num_decoder_threads()}))
"""


@pytest.fixture
def files(make_video: Callable[..., Path], make_audio: Callable[..., Path], tmp_path: Path) -> list[ClipSource]:
    video = make_video("seen and heard.mp4", num_frames=20, fps=4, audio=True, size=(64, 48))
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"0" * 512 + video.read_bytes())
    member = ShardMember(MediaSource(str(shard), "b.mp4", 512, video.stat().st_size))
    damaged = make_video("damaged.mp4", num_frames=20, fps=4, audio=True)
    damage_sound(damaged)
    (tmp_path / "no.mp4").write_bytes(b"nothing of a video" * 99)
    sounds = [make_audio("stereo.wav", channels=2, rate_hz=44_100), make_audio("quick.wav", rate_hz=16_000)]
    return [video, member, make_video("silent.mp4"), damaged, *sounds, tmp_path / "no.mp4", torch.zeros(4, 3, 28, 28)]


def read_all(sources: list[ClipSource], reader: ClipReader, num_workers: int) -> list[WindowRead]:
    reads = read_ahead(enumerate(sources), reader, num_workers)
    return sorted(reads, key=lambda read: (read.key, read.number))


def assert_same(mine: object, its: object) -> None:
    """Bit by bit."""
    assert type(mine) is type(its)
    if not isinstance(mine, Window):
        assert str(mine) == str(its)
        return
    assert isinstance(its, Window)
    assert (mine.sound, mine.start_seconds, mine.end_seconds) == (its.sound, its.start_seconds, its.end_seconds)
    if isinstance(mine.frames, VideoFrames) and isinstance(its.frames, VideoFrames):
        assert torch.equal(mine.frames.pixel_values, its.frames.pixel_values)
        assert (mine.frames.kind, mine.frames.indices) == (its.frames.kind, its.frames.indices)
        assert mine.frames.message == its.frames.message
    assert isinstance(mine.audio, AudioSegments) == isinstance(its.audio, AudioSegments)
    if isinstance(mine.audio, AudioSegments) and isinstance(its.audio, AudioSegments):
        assert torch.equal(mine.audio.values, its.audio.values)
        assert mine.audio.duration_seconds == its.audio.duration_seconds


@pytest.mark.parametrize("window_seconds", [None, 2.0])
def test_processes_give_bit_by_bit_what_reading_here_gives(
    files: list[ClipSource], window_seconds: float | None
) -> None:
    reader = ClipReader(MEDIA, window_seconds=window_seconds)
    here, ahead = (read_all(files, reader, num_workers) for num_workers in (0, 2))
    assert len(here) == len(ahead)
    for mine, its in zip(ahead, here, strict=True):
        assert (mine.key, mine.number, mine.num_windows) == (its.key, its.number, its.num_windows)
        assert_same(mine.window, its.window)


def test_a_file_gives_what_the_media_processor_gives(files: list[ClipSource]) -> None:
    [read] = read_all(files[:1], ClipReader(MEDIA), 1)
    frames, sound = MEDIA.process_video(files[0])
    assert isinstance(read.window, Window)
    assert isinstance(read.window.frames, VideoFrames)
    normalised = read.window.frames.with_tensor(normalize_pixels(read.window.frames.tensor))
    assert_same(replace(read.window, frames=normalised), Window(frames, sound, "heard"))


def test_a_decoding_process_loads_nothing_heavy(make_video: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", REPORT, str(make_video("a.mp4", audio=True))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"frames": 4, "loaded": [], "threads": 1}


class Deadly:
    """A clip whose decoder takes its process with it, each time or the first time."""

    def __init__(self, path: Path, once: Path | None = None) -> None:
        self.path, self.once = path, once

    def __str__(self) -> str:
        return "deadly.mp4"

    @contextmanager
    def open(self) -> Iterator[str]:
        if self.once is None or not self.once.exists():
            if self.once is not None:
                self.once.touch()
            os._exit(3)
        yield str(self.path)


@pytest.mark.slow
def test_a_clip_that_kills_its_process_is_tried_twice(files: list[ClipSource], tmp_path: Path) -> None:
    given = [files[0], Deadly(files[0]), Deadly(files[0], tmp_path / "was here"), files[2]]
    reads = read_all(given, ClipReader(MEDIA), 2)
    assert [isinstance(read.window, Window) for read in reads] == [True, False, True, True]
    assert str(reads[1].window) == "deadly.mp4: the process that decodes it crashes"


class Chatty:
    """A decoder that prints, as some libraries do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def open(self) -> Iterator[str]:
        os.write(1, b"hello from C\n")
        yield str(self.path)


class Faulty:
    """A bug, not a bad file."""

    def open(self) -> None:
        raise ZeroDivisionError("a bug")


@pytest.mark.slow
def test_what_a_decoder_prints_stays_apart_from_what_it_gives(files: list[ClipSource]) -> None:
    [read] = read_all([Chatty(files[0])], ClipReader(MEDIA), 1)
    assert isinstance(read.window, Window)


@pytest.mark.slow
def test_a_bug_stops_the_run_and_is_no_bad_file(files: list[ClipSource]) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        read_all([files[0], Faulty()], ClipReader(MEDIA), 1)


def test_what_cannot_be_sent_to_another_process_is_read_in_this_one(files: list[ClipSource]) -> None:
    class Local:
        @contextmanager
        def open(self) -> Iterator[str]:
            yield str(files[0])

    here = os.getpid()
    opened_in: list[int] = []

    class Watched(Local):
        @contextmanager
        def open(self) -> Iterator[str]:
            opened_in.append(os.getpid())
            with super().open() as path:
                yield path

    [read] = read_all([Watched()], ClipReader(MEDIA), 1)
    assert isinstance(read.window, Window)
    assert opened_in == [here]


@pytest.mark.slow
def test_a_class_of_the_main_script_is_read_there(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\n"
        "from contextlib import contextmanager\n"
        "from video_llama.processor.clips import ClipReader, Window\n"
        "from video_llama.processor.media_processor import MediaProcessor\n"
        "from video_llama.inference.workers import read_ahead\n"
        "class Mine:\n"
        "    @contextmanager\n"
        "    def open(self):\n"
        "        yield sys.argv[1]\n"
        "reads = list(read_ahead([(0, Mine()), (1, sys.argv[1])], ClipReader(MediaProcessor(image_size=28)), 1))\n"
        "print(*(type(read.window).__name__ for read in reads))\n"  # no `if __name__ == '__main__'` is needed
    )
    command = [sys.executable, str(script), str(make_video("a.mp4"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Window", "Window"]


def test_whoever_stops_reading_leaves_no_process_behind(files: list[ClipSource]) -> None:
    before = set(psutil.Process().children())
    reads = read_ahead(enumerate(files[:1] * 20), ClipReader(MEDIA), 2)
    next(reads)
    assert set(psutil.Process().children()) - before
    reads.close()
    assert set(psutil.Process().children()) == before


@pytest.mark.slow
def test_processes_end_when_their_owner_is_killed(tmp_path: Path, make_video: Callable[..., Path]) -> None:
    code = (
        "import sys, os, psutil, signal\n"
        "from video_llama.processor.clips import ClipReader\n"
        "from video_llama.processor.media_processor import MediaProcessor\n"
        "from video_llama.inference.workers import read_ahead\n"
        "reads = read_ahead(enumerate([sys.argv[1]] * 9), ClipReader(MediaProcessor(image_size=28)), 1)\n"
        "next(reads)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(make_video("a.mp4"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    [process] = [int(word) for word in done.stdout.split()]
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_unknown_reader_is_said_before_a_process_starts(files: list[ClipSource]) -> None:
    reader = ClipReader(MediaProcessor(image_size=28, num_frames=4, video_reader="pyaw"))
    with pytest.raises(ConfigError, match="did you mean 'pyav'"):
        read_all(files[:1], reader, 1)


def test_errors_name_the_clip_and_not_the_file_it_was_copied_to(tmp_path: Path) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(b"no video at all" * 99)
    member = ShardMember(MediaSource(str(shard), "b.mp4", 0, 1000))
    [read] = read_all([member], ClipReader(MEDIA), 1)
    assert isinstance(read.window, MediaError)
    assert read.window.path == f"{shard}#b.mp4"


def test_a_process_that_does_not_answer_costs_its_clip_alone(
    files: list[ClipSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that reads from a network file system that is gone."""
    reader = ClipReader(MEDIA)
    with monkeypatch.context() as patched:
        patched.setattr(decode_process, "_START", "import time; time.sleep(600)")
        begun = time.monotonic()
        (read,) = read_ahead(enumerate(files[:1]), reader, 1, seconds=1.0)
    assert "takes too long" in str(read.window)
    assert time.monotonic() - begun < 300
    (read,) = read_ahead(enumerate(files[:1]), reader, 1, seconds=300.0)
    assert isinstance(read.window, Window)
