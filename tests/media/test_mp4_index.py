"""The index of an MP4 file tells the same as all of its packets, and nothing where it might not."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from tests.conftest import MakeVideo, draw_frame, frame_number
from video_llama.media import pyav_reader
from video_llama.media.containers import demux_packets
from video_llama.media.decode import decode_video
from video_llama.media.frame_index import FrameIndex, index_frames, read_mp4_index

needs_index = pytest.mark.skipif(
    not hasattr(VideoStream, "index_entries"), reason="PyAV before 17 does not tell FFmpeg's index"
)


def index_of(path: Path) -> FrameIndex | None:
    with av.open(str(path)) as container:
        return read_mp4_index(path, container, container.streams.video[0])


def index_by_packets(path: Path) -> FrameIndex:
    with av.open(str(path)) as container:
        packets = demux_packets(container, container.streams.video[0], path)
        return index_frames(packets, container.format)


@needs_index
@pytest.mark.parametrize(
    "options",
    [
        {"options": {"bf": "0"}},
        {"options": {"bf": "3", "g": "7"}},
        {"codec": "libx265", "options": {"x265-params": "keyint=5:log-level=none"}},
        {"codec": "mpeg4", "options": {"g": "4"}},
        {"codec": "libx264", "name": "clip.mov", "audio": True},
        {"num_frames": 1},
        {"fps": Fraction(30000, 1001), "audio": "aac", "container_options": {"movflags": "empty_moov"}},
        {"container_options": {"use_editlist": "0"}},
        {"container_options": {"movflags": "negative_cts_offsets"}},
        {"container_options": {"movie_timescale": "90000"}},
    ],
)
def test_the_index_says_what_all_packets_say(make_video: MakeVideo, options: dict[str, object]) -> None:
    path = make_video(**{"num_frames": 23, **options})
    times = index_of(path)
    if "empty_moov" in str(options):
        assert times is None
    else:
        assert times is not None
        assert times == index_by_packets(path)


@needs_index
def test_frames_of_unequal_length_are_found(tmp_path: Path) -> None:
    path, moments = tmp_path / "uneven.mp4", [0, 1, 5, 6, 30, 31, 32, 90, 91, 100]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "2", "g": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for number, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(draw_frame(number, 64, 48), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    times = index_of(path)
    assert times is not None
    assert times == index_by_packets(path)
    assert [frame_number(frame) for frame in decode_video(path, 10, 48, 64).frames] == list(range(10))


@needs_index
def test_a_long_file_is_not_read(make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_video(num_frames=600, options={"g": "10"})
    seen = 0
    demux = pyav_reader.demux_packets

    def count(*args: object) -> object:
        nonlocal seen
        for packet in demux(*args):
            seen += 1
            yield packet

    monkeypatch.setattr(pyav_reader, "demux_packets", count)
    frames = decode_video(path, 4, 48, 64).frames
    assert [frame_number(frame) for frame in frames] == [index % 24 for index in (0, 150, 300, 450)]
    assert seen < 4 * (10 + 4)


def test_frames_that_an_edit_list_cuts_away_are_left_to_the_packets(make_video: MakeVideo, tmp_path: Path) -> None:
    source, path = make_video(num_frames=20, options={"g": "20", "bf": "0"}), tmp_path / "cut.mp4"
    content = bytearray(source.read_bytes())
    start = content.index(b"elst") + 4 + 8  # version, flags and number of entries come first
    content[start + 4 : start + 8] = (int.from_bytes(content[start + 4 : start + 8], "big") + 512 * 5).to_bytes(
        4, "big"
    )
    path.write_bytes(content)
    expected = index_by_packets(path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert read_mp4_index(path, container, stream) is None
        assert index_frames(demux_packets(container, stream, path), container.format) == expected


@pytest.mark.parametrize("format_name", ["clip.mkv", "clip.avi", "clip.ts"])
def test_other_formats_have_no_such_index(make_video: MakeVideo, format_name: str) -> None:
    assert index_of(make_video(format_name)) is None


def _claim_many(content: bytearray) -> None:
    start = content.index(b"stts") + 12
    content[start : start + 4] = (2**31).to_bytes(4, "big")


def _keyframe_past_the_end(content: bytearray) -> None:
    start = content.index(b"stss") + 12
    content[start : start + 4] = (10**6).to_bytes(4, "big")


def _longer_than_its_box(content: bytearray) -> None:
    start = content.index(b"ctts") + 8
    content[start : start + 4] = (10**6).to_bytes(4, "big")


def _another_time(content: bytearray) -> None:
    start = content.index(b"ctts") + 16
    content[start : start + 4] = (int.from_bytes(content[start : start + 4], "big") ^ 1).to_bytes(4, "big")


def _another_box(content: bytearray) -> None:
    start = content.index(b"stts")
    content[start : start + 4] = b"none"


@pytest.mark.parametrize("damage", [_claim_many, _keyframe_past_the_end, _longer_than_its_box, _another_box])
def test_damaged_tables_give_no_answer(make_video: MakeVideo, damage: Callable[[bytearray], None]) -> None:
    whole = make_video(num_frames=23)
    with av.open(str(whole)) as container:
        content = bytearray(whole.read_bytes())
        damage(content)
        broken = whole.with_name("broken.mp4")
        broken.write_bytes(content)
        assert read_mp4_index(broken, container, container.streams.video[0]) is None


def test_times_that_ffmpeg_does_not_share_give_no_answer(make_video: MakeVideo) -> None:
    whole = make_video(num_frames=23)
    content = bytearray(whole.read_bytes())
    _another_time(content)
    other = whole.with_name("other.mp4")
    other.write_bytes(content)
    with av.open(str(whole)) as container:
        stream = container.streams.video[0]
        assert read_mp4_index(other, container, stream) is None
        first = next(container.demux(stream))
        assert np.isclose(float(first.pts * first.time_base), 0.0)
