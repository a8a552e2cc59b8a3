"""Sampled video frames through both readers, and what is wrong with files that give none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import (
    MakeAudio,
    MakeVideo,
    add_video_stream,
    draw_frame,
    encode_video,
    frame_number,
    join_videos,
    rotate_mp4,
)
from video_llama.errors import ConfigError, MediaError
from video_llama.media import pyav_reader
from video_llama.media.containers import limit_frames
from video_llama.media.decode import DecodedVideo, decode_video, num_decoder_threads
from video_llama.registry import VIDEO_READERS

READERS = ("pyav", "decord")
Damage = Callable[[Path], Path]


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def decode(path: Path, reader: str, num_frames: int = 4, **options: Any) -> DecodedVideo:
    return decode_video(path, num_frames, 48, 64, reader=reader, **options)


def numbers(decoded: DecodedVideo) -> list[int]:
    """The index drawn into each frame, which repeats after 24."""
    return [frame_number(frame) for frame in decoded.frames]


def red_corner(frame: NDArray[np.uint8]) -> str:
    """Where the quarter lies that was drawn red at the top left."""
    height, width = frame.shape[:2]
    quarters = {
        "top left": frame[: height // 2, : width // 2],
        "top right": frame[: height // 2, width // 2 :],
        "bottom left": frame[height // 2 :, : width // 2],
        "bottom right": frame[height // 2 :, width // 2 :],
    }
    redness = {where: float(part[..., 0].mean() - part[..., 1].mean()) for where, part in quarters.items()}
    return max(redness, key=lambda where: redness[where])


def read_times(path: Path) -> list[float]:
    with av.open(str(path)) as container:
        return [float(frame.time) for frame in container.decode(video=0)]


def test_sampled_frames_are_the_ones_at_their_indices(make_video: MakeVideo, reader: str) -> None:
    decoded = decode(make_video(num_frames=22, fps=10), reader)
    assert decoded.indices == numbers(decoded) == [0, 5, 11, 16]
    assert decoded.times_seconds == pytest.approx([0.0, 0.5, 1.1, 1.6])
    assert (decoded.fps, decoded.num_source_frames) == (10.0, 22)
    assert (decoded.frames.shape, decoded.frames.dtype) == ((4, 48, 64, 3), np.uint8)


@pytest.mark.parametrize("num_frames", [5, 8, 64, 128])
def test_a_video_gives_all_its_frames_where_more_are_asked_for(
    make_video: MakeVideo, reader: str, num_frames: int
) -> None:
    decoded = decode(make_video(num_frames=5), reader, num_frames)
    assert decoded.indices == numbers(decoded) == [0, 1, 2, 3, 4]


def test_more_frames_than_a_model_has_positions_for_are_sampled(make_video: MakeVideo, reader: str) -> None:
    decoded = decode(make_video(num_frames=70), reader, 64)
    assert len(decoded.frames) == 64
    assert numbers(decoded) == [index % 24 for index in decoded.indices]


def test_a_video_of_one_frame_gives_it(make_video: MakeVideo, reader: str) -> None:
    decoded = decode(make_video(num_frames=1), reader)
    assert (decoded.indices, decoded.times_seconds, numbers(decoded)) == ([0], [0.0], [0])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("gop.mp4", "libx264", {"g": "5", "bf": "2"}),
        ("long.mp4", "libx264", {"g": "250", "bf": "3", "b_strategy": "0"}),
        ("old.mp4", "mpeg4", {}),
        ("clip.mkv", "libx264", {"bf": "2"}),
        ("clip.mov", "libx265", {"x265-params": "log-level=none"}),
        ("clip.webm", "libvpx-vp9", {}),
    ],
)
def test_frames_are_exact_in_every_container_and_codec(
    make_video: MakeVideo, reader: str, name: str, codec: str, options: dict[str, str]
) -> None:
    path = make_video(name, num_frames=24, fps=25, codec=codec, options=options)
    decoded = decode(path, reader, 6)
    assert decoded.indices == numbers(decoded) == [0, 4, 8, 12, 16, 20]


def test_an_animation_is_a_video(make_video: MakeVideo, reader: str) -> None:
    decoded = decode(make_video("clip.gif", num_frames=24, codec="gif"), reader)
    assert decoded.indices == [0, 6, 12, 18]
    assert np.diff(decoded.frames[:, -1, -1, 0].astype(int)).min() > 0


def test_decord_says_what_it_cannot_do_and_who_may(make_video: MakeVideo) -> None:
    with pytest.raises(MediaError, match=r"decord cannot decode it: .* \(the video reader 'pyav' may be able to\)"):
        decode_video(make_video(), 2, 48, 48, reader="decord")


def test_a_sampler_may_repeat_frames(make_video: MakeVideo, reader: str) -> None:
    decoded = decode(make_video(num_frames=8), reader, sample=lambda there, wanted: [2, 2, there - 1, there - 1])
    assert decoded.indices == numbers(decoded) == [2, 2, 7, 7]


@pytest.mark.parametrize(
    ("quarter_turns", "where"), [(0, "top left"), (1, "bottom left"), (2, "bottom right"), (3, "top right")]
)
def test_rotation_metadata_is_honoured(make_video: MakeVideo, reader: str, quarter_turns: int, where: str) -> None:
    path = make_video()
    rotate_mp4(path, quarter_turns)
    decoded = decode(path, reader)
    assert [red_corner(frame) for frame in decoded.frames] == [where] * 4


def test_frames_are_squashed_to_the_size_that_is_asked_for(make_video: MakeVideo, reader: str) -> None:
    decoded = decode_video(make_video(size=(128, 32)), 2, 20, 30, reader=reader)
    assert decoded.frames.shape == (2, 20, 30, 3)
    assert [red_corner(frame) for frame in decoded.frames] == ["top left"] * 2


def test_a_window_is_sampled_on_its_own(make_video: MakeVideo, reader: str) -> None:
    path = make_video(num_frames=24, fps=10)
    decoded = decode(path, reader, start_seconds=1.0, end_seconds=1.8)
    assert decoded.indices == numbers(decoded) == [10, 12, 14, 16]
    assert decoded.times_seconds == pytest.approx([1.0, 1.2, 1.4, 1.6])
    assert decode(path, reader, start_seconds=2.05, end_seconds=2.06).indices == [20]


def test_a_window_after_the_end_is_an_error_that_names_the_file(make_video: MakeVideo, reader: str) -> None:
    with pytest.raises(MediaError, match=r"clip\.mp4: the video ends after 1\.20 seconds, before 9\.0 seconds"):
        decode(make_video(num_frames=12, fps=10), reader, start_seconds=9.0)


def test_frames_of_a_variable_rate_are_counted_and_have_the_times_that_the_file_states(
    tmp_path: Path, reader: str
) -> None:
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (64, 48), 10, "libx264")
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time_ms in enumerate([0, 40, 80, 120, 600, 1500, 1540, 1580]):
            frame = av.VideoFrame.from_ndarray(draw_frame(index, 64, 48), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read_times(path)[5] == pytest.approx(1.5)
    decoded = decode(path, reader)
    assert decoded.indices == numbers(decoded) == [0, 2, 4, 6]
    assert decoded.times_seconds == pytest.approx([0.0, 0.08, 0.6, 1.54])
    window = decode(path, reader, start_seconds=0.5, end_seconds=1.52)
    # The frame on the screen at the start, and those that come before the end.
    assert window.indices == numbers(window) == [3, 4, 5]
    assert window.times_seconds == pytest.approx([0.12, 0.6, 1.5])


@pytest.mark.parametrize("default", [0, 1])
def test_the_default_one_of_several_video_streams_is_read(tmp_path: Path, reader: str, default: int) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [add_video_stream(container, (64, 48), 10, "libx264") for _ in range(2)]
        for number, stream in enumerate(streams):
            stream.disposition = (Disposition.default if number == default else Disposition.forced).value
        for number, stream in enumerate(streams):
            encode_video(container, stream, [draw_frame(10 * number + index, 64, 48) for index in range(8)])
    assert numbers(decode(path, reader)) == [10 * default + index for index in (0, 2, 4, 6)]


def test_both_readers_give_nearly_the_same_pixels(make_video: MakeVideo) -> None:
    path = make_video(size=(100, 80), num_frames=8)
    frames, others = (decode(path, name).frames.astype(int) for name in READERS)
    assert np.abs(frames - others).mean() <= 2


def test_both_readers_are_registered_and_another_name_is_an_error(make_video: MakeVideo, reader: str) -> None:
    assert reader in VIDEO_READERS.names()
    with pytest.raises(ConfigError, match=rf"unknown video reader '{reader}2'; did you mean '{reader}'"):
        decode(make_video(), reader + "2")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let even small videos be decoded by three decoders at once; says which keyframes each of them decoded from."""
    monkeypatch.setattr(pyav_reader, "num_decoder_threads", lambda: 3)
    monkeypatch.setattr(pyav_reader, "_MIN_PARALLEL_PIXELS", 0)
    starts: list[int] = []
    read = pyav_reader._Decoder.read

    def remember(self: Any, start: int, wanted: list[int]) -> Any:
        assert threading.current_thread().name.startswith("video-llama-frames")
        starts.append(start)
        return read(self, start, wanted)

    monkeypatch.setattr(pyav_reader._Decoder, "read", remember)
    return starts


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_frames_behind_several_keyframes_are_decoded_at_once_and_the_same(
    make_video: MakeVideo, at_once: list[int], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = make_video(name, num_frames=48, options={"g": "8", "bf": "2", "x264-params": "scenecut=0:open-gop=0"})
    first, second = decode(path, "pyav", 12), decode(path, "pyav", 12)
    assert sorted(at_once) == sorted([0, 8, 16, 24, 32, 40] * 2)
    monkeypatch.undo()
    expected = decode(path, "pyav", 12)
    assert (first.indices, numbers(first)) == (expected.indices, numbers(expected))
    assert np.array_equal(first.frames, expected.frames)
    assert np.array_equal(second.frames, expected.frames)


def test_damage_behind_one_of_several_keyframes_is_an_error(make_video: MakeVideo, at_once: list[int]) -> None:
    path = make_video(num_frames=48, options={"g": "8", "x264-params": "scenecut=0"})
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        damaged = [(packet.pos, packet.size) for packet in packets[16:24]]
    content = bytearray(path.read_bytes())
    for position, size in damaged:
        content[position : position + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"clip\.mp4: the video is damaged near frame"):
        decode(path, "pyav", 12)
    assert len(at_once) > 1


def test_frames_may_grow_no_larger_in_any_thread(make_video: MakeVideo, tmp_path: Path, at_once: list[int]) -> None:
    parts = [make_video("a.h264", num_frames=8), make_video("b.h264", num_frames=8, size=(256, 192))]
    path = join_videos(tmp_path / "grows.mkv", *parts)
    with limit_frames(100 * 100), pytest.raises(MediaError, match="damaged near frame 8"):
        decode(path, "pyav", 8)
    assert sorted(at_once) == [0, 8]


def test_decoders_use_torchs_threads_but_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, expected in ((1, 1), (3, 3), (64, 8)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert num_decoder_threads() == expected


def make_empty(path: Path) -> None:
    path.touch()


def make_folder(path: Path) -> None:
    path.mkdir()


def make_text(path: Path) -> None:
    path.write_text("I am no video.\n")


def make_still(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="PNG")


def make_garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def make_nothing(path: Path) -> None:
    """Leave the file out."""


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (make_nothing, "no such file"),
        (make_empty, "the file is empty"),
        (make_folder, "a folder, not a file"),
        (make_text, "a text file, not a video or audio file"),
        (make_still, "a still image (PNG), not a video or audio file"),
        (make_garbage, "not a media file, or damaged beyond reading: Invalid data found when processing input"),
    ],
)
def test_what_is_no_video_is_an_error_of_one_line_that_names_file_and_cause(
    tmp_path: Path, reader: str, make: Callable[[Path], None], cause: str
) -> None:
    path = tmp_path / "wrong.mp4"
    make(path)
    with pytest.raises(MediaError) as caught:
        decode(path, reader)
    assert (caught.value.path, caught.value.reason) == (str(path), cause)
    assert "\n" not in str(caught.value)


def test_a_sound_is_not_a_video(make_audio: MakeAudio, reader: str) -> None:
    with pytest.raises(MediaError, match=r"tone\.mp4: sound only, no video"):
        decode(make_audio("tone.mp4", codec="aac"), reader)


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_truncated_video_is_an_error_that_says_so(
    make_video: MakeVideo, tmp_path: Path, reader: str, name: str, kept: float
) -> None:
    whole, path = make_video(name, num_frames=30).read_bytes(), tmp_path / f"cut_{name}"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(MediaError, match=rf"cut_{name}: the file is truncated: \d+ of \d+ bytes are there"):
        decode(path, reader)


def test_a_damaged_video_is_an_error(make_video: MakeVideo, tmp_path: Path, reader: str) -> None:
    content = bytearray(make_video(num_frames=30, options={"g": "30"}).read_bytes())
    start = content.index(b"mdat") + 4
    content[start + 700 :] = b"\xff" * len(content[start + 700 :])
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"damaged\.mp4: ") as caught:
        decode(path, reader)
    assert "\n" not in str(caught.value)


def test_a_video_without_frames_is_an_error(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as container:
        add_video_stream(container, (64, 48), 10, "libx264")
        container.start_encoding()
    with pytest.raises(MediaError, match=r"none\.mkv: "):
        decode(path, reader)
