"""Long videos window by window: which frames, which sound, opened seldom, and damage that costs one window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import frame_number
from video_llama.errors import MediaError, VideoLlamaError
from video_llama.inference.workers import WindowRead, read_ahead
from video_llama.media import decode as decoding
from video_llama.media.decode import num_windows
from video_llama.processor.clips import ClipReader, Window
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.transforms import normalize_pixels

MEDIA = MediaProcessor(image_size=28, num_frames=4)


@pytest.fixture
def long_video(make_video: Callable[..., Path]) -> Path:
    """10.5 s at 2 frames a second; with windows of 1 s more than are read at once."""
    return make_video("long.mp4", num_frames=21, fps=2, audio=True, options={"g": "5"})


def read_all(reader: ClipReader, path: Path, num_workers: int = 0) -> list[WindowRead]:
    return sorted(read_ahead([(7, str(path))], reader, num_workers), key=lambda read: read.number)


def windows_of(reads: list[WindowRead]) -> list[Window]:
    assert all(isinstance(read.window, Window) for read in reads)
    return [read.window for read in reads if isinstance(read.window, Window)]


@pytest.mark.parametrize(
    ("duration", "seconds", "expected"),
    [(60, 20, 3), (69, 20, 3), (70, 20, 4), (5, 20, 1), (0.1, 20, 1), (10, 0.5, 20)],
)
def test_a_rest_shorter_than_half_a_window_belongs_to_the_last_one(
    duration: float, seconds: float, expected: int
) -> None:
    assert num_windows(duration, seconds) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_windows_cover_the_video_without_gap_or_overlap(long_video: Path, num_workers: int) -> None:
    reads = read_all(ClipReader(MEDIA, window_seconds=1.0), long_video, num_workers)
    assert [(read.key, read.number, read.num_windows) for read in reads] == [(7, n, 11) for n in range(11)]
    windows = windows_of(reads)
    shown = []
    for window in windows:
        assert isinstance(window.frames, VideoFrames)
        shown += [frame_number(frame) for frame in window.frames.frames]
    assert shown == list(range(21))
    assert [window.start_seconds for window in windows] == [float(n) for n in range(11)]
    assert [window.end_seconds for window in windows] == [*(float(n) for n in range(1, 11)), 10.5]


def test_a_window_is_what_the_cut_out_clip_would_be(long_video: Path) -> None:
    windows = windows_of(read_all(ClipReader(MEDIA, window_seconds=4.0), long_video))
    assert len(windows) == 3
    second = windows[1]
    assert isinstance(second.frames, VideoFrames)
    assert isinstance(second.audio, AudioSegments)
    assert second.frames.indices == [8, 10, 12, 14]
    assert second.frames.message == "The video contains 4 frames sampled at 0.0, 1.0, 2.0, 3.0 seconds. "
    assert second.audio.duration_seconds == pytest.approx(4.0)
    whole, sound = MEDIA.process_video(long_video, num_frames=21)
    assert torch.equal(normalize_pixels(second.frames.pixel_values), whole.pixel_values[8:16:2])
    assert sound is not None
    assert second.audio.values.shape == sound.values.shape


def test_a_video_shorter_than_a_window_is_one_window(make_video: Callable[..., Path]) -> None:
    [read] = read_all(ClipReader(MEDIA, window_seconds=60.0), make_video("short.mp4", num_frames=12, fps=10))
    assert isinstance(read.window, Window)
    assert (read.num_windows, read.window.start_seconds, read.window.end_seconds) == (1, 0.0, 1.2)
    assert read.window.sound == "no sound track"


def test_a_long_video_is_opened_once_for_several_windows(long_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_reader = decoding.VIDEO_READERS.get("pyav")

    @contextmanager
    def remember(path: str, height: int, width: int) -> Iterator[Any]:
        opened.append(path)
        with open_reader(path, height, width) as video:
            yield video

    monkeypatch.setattr(decoding, "_find_reader", lambda name: remember)
    read_all(ClipReader(MEDIA, audio=False, window_seconds=1.0), long_video)
    assert opened == [str(long_video)] * 2


def test_damage_in_one_window_leaves_the_others(long_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = decoding.sample_window

    def fail(video: Any, path: str, num_frames: int, sampler: Any, start: float, end: float | None) -> Any:
        if start == 4.0:
            raise MediaError(path, "the video is damaged near frame 9")
        return sample(video, path, num_frames, sampler, start, end)

    monkeypatch.setattr(decoding, "sample_window", fail)
    reads = read_all(ClipReader(MEDIA, window_seconds=4.0), long_video)
    assert [isinstance(read.window, VideoLlamaError) for read in reads] == [False, True, False]


def test_a_member_of_a_shard_is_called_by_its_own_name(tmp_path: Path) -> None:
    class Member:
        def __str__(self) -> str:
            return "a.tar#b.mp4"

        @contextmanager
        def open(self) -> Iterator[str]:
            (tmp_path / "passing").write_bytes(b"no video at all" * 99)
            yield str(tmp_path / "passing")

    _, [error] = ClipReader(MEDIA)(Member())
    assert str(error).startswith("a.tar#b.mp4: ")


def test_a_disk_that_fails_is_an_error_of_the_clip(long_video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise OSError("input/output error")

    monkeypatch.setattr(decoding, "check_media_file", fail)
    assert [str(error) for error in ClipReader(MEDIA)(str(long_video))[1]] == [
        f"{long_video}: cannot be read: input/output error"
    ]


def test_windows_of_no_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="windows must be longer than 0"):
        ClipReader(MEDIA, window_seconds=0)
