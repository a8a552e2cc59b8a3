"""Streams that are not what their container says, have no container at all, or end with something else than a frame."""

from __future__ import annotations

import logging
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from PIL import Image

from tests.conftest import MakeVideo, add_video_stream
from tests.media.barcode import draw_barcode, read_barcode
from video_llama.errors import MediaError
from video_llama.media.decode import decode_video

RATE = 10


def write_video(path: Path, codec: str, num_frames: int, options: dict[str, str] | None = None) -> Path:
    """A video of numbered frames, in the smallest size that H.263 has."""
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (176, 144), RATE, codec, options)
        for number in range(num_frames):
            pixels = np.asarray(Image.fromarray(draw_barcode(number)).resize((176, 144)))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def call_keyframes(source: Path, path: Path, every: int) -> Path:
    """Copy a video and call each n-th frame a keyframe."""
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for number, packet in enumerate(container.demux(stream)):
            if packet.size:
                packet.is_keyframe = number % every == 0
                packet.stream = copy
                output.mux(packet)
    return path


def change_header(source: Path, path: Path, what: str) -> Path:
    """Copy a bare H.264 stream with something else in its header."""
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        change = BitStreamFilterContext(f"h264_metadata={what}", stream)
        packets = [bytes(changed) for packet in container.demux(stream) for changed in change.filter(packet)]
    path.write_bytes(b"".join(packets))
    return path


def numbers(path: Path, indices: list[int]) -> list[int]:
    decoded = decode_video(path, len(indices), 144, 176, sample=lambda there, wanted: indices)
    return [read_barcode(frame) for frame in decoded.frames]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "mpeg4"), ("mov", "mpeg4"), ("3gp", "h263"), ("mp4", "mpeg2video")],
)
def test_frames_behind_a_false_keyframe_are_those_of_decoding_from_the_start(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    true = write_video(tmp_path / f"true.{suffix}", codec, 60, {"g": "300"})
    false = call_keyframes(true, tmp_path / f"false.{suffix}", every=20)
    with av.open(str(false)) as container:
        stream = container.streams.video[0]
        assert sum(packet.is_keyframe for packet in container.demux(stream) if packet.size) == 3
    indices = [0, 7, 20, 22, 30, 37, 40, 45, 52, 59]
    assert numbers(false, indices) == numbers(true, indices) == indices
    assert numbers(false, [45]) == [45]


@pytest.mark.parametrize(("name", "codec"), [("a.h264", "libx264"), ("a.264", "libx264"), ("a.hevc", "libx265")])
def test_a_bare_stream_is_read_by_opening_it_again(tmp_path: Path, name: str, codec: str) -> None:
    options = {"g": "12", "bf": "2"}
    if codec == "libx265":
        options["x265-params"] = "log-level=none"
    path = write_video(tmp_path / name, codec, 40, options)
    assert numbers(path, [0, 13, 26, 39]) == [0, 13, 26, 39]
    decoded = decode_video(path, 4, 144, 176, start_seconds=1.0, end_seconds=1.4)
    numbered = [read_barcode(frame) for frame in decoded.frames]
    # The stream may state its rate or not; FFmpeg takes 25 a second for it then.
    assert numbered == decoded.indices
    assert decoded.times_seconds == pytest.approx([index / decoded.fps for index in decoded.indices])


@pytest.mark.parametrize("position", ["end", "middle"])
def test_the_frame_on_the_screen_stands_for_one_that_is_missing(tmp_path: Path, position: str) -> None:
    path = tmp_path / "edited.gif"
    frames = [Image.fromarray(draw_barcode(number)) for number in range(5)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    content = path.read_bytes()
    comment = b"\x21\xfe\x05hello\x00"
    place = len(content) - 1
    if position == "middle":
        # Each frame begins with its graphic control extension.
        place = content.rindex(b"\x21\xf9\x04")
    path.write_bytes(content[:place] + comment + content[place:])
    decoded = decode_video(path, 100, 64, 96)
    seen = [read_barcode(frame) for frame in decoded.frames]
    assert sorted(set(seen)) == [0, 1, 2, 3, 4]
    assert seen == sorted(seen)
    assert len(decode_video(path, 3, 64, 96).frames) == 3


@pytest.mark.parametrize("matrix", [8, 10, 11, 14, 15])
def test_a_colour_matrix_that_ffmpeg_refuses_is_taken_for_another_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, matrix: int
) -> None:
    plain = write_video(tmp_path / "plain.h264", "libx264", 12, {"g": "4"})
    path = change_header(plain, tmp_path / f"matrix{matrix}.h264", f"matrix_coefficients={matrix}")
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).colorspace == matrix
    with caplog.at_level(logging.WARNING):
        decoded = [decode_video(path, 6, 48, 64) for _ in range(2)]
    assert len(caplog.records) == 1
    assert f"its colour matrix ({matrix} in H.273) is not supported" in caplog.text
    # The same bytes, for which nothing is specified, are BT.601 to FFmpeg.
    expected = decode_video(plain, 6, 48, 64)
    for each in decoded:
        assert np.array_equal(each.frames, expected.frames)


@pytest.mark.parametrize("what", ["transfer_characteristics=9", "colour_primaries=3", "colour_primaries=40"])
def test_primaries_and_transfer_functions_that_ffmpeg_refuses_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    if not hasattr(av.VideoFrame, "color_trc"):
        pytest.skip("this PyAV cannot set them")
    plain = write_video(tmp_path / "plain.h264", "libx264", 6)
    path = change_header(plain, tmp_path / "odd.h264", what)
    assert np.array_equal(decode_video(path, 6, 48, 64).frames, decode_video(plain, 6, 48, 64).frames)
    assert not caplog.records


@pytest.mark.parametrize("movflags", ["frag_keyframe+empty_moov+default_base_moof", "dash"])
def test_the_head_of_a_video_in_fragments_has_no_frames(make_video: MakeVideo, movflags: str) -> None:
    path = make_video(audio=True, container_options={"movflags": movflags})
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moof") - 4])
    with pytest.raises(MediaError, match=r"clip\.mp4: (the video has no frames|no frames)"):
        decode_video(path, 4, 48, 64)
