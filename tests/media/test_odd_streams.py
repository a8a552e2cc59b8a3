"""Streams that are not what their container says, have no container at all, or end with something else than a frame."""

from __future__ import annotations

import logging
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from av.video.frame import PictureType
from PIL import ExifTags, Image, ImageOps

from tests.conftest import MakeVideo, add_video_stream
from tests.media.barcode import CORNERS, corner_colours, draw_barcode, read_barcode
from video_llama.errors import MediaError
from video_llama.media.containers import media_kind
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


@pytest.mark.parametrize("suffix", ["flv", "ts", "mkv", "mp4", "nut"])
def test_a_keyframe_that_is_decoded_before_the_one_in_front_of_it_is_shown_is_not_taken_for_that(
    tmp_path: Path, suffix: str
) -> None:
    # FLV files are sought in by times of decoding: to when the first frame is shown, that leads to the frame 2.
    path = tmp_path / f"close.{suffix}"
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (96, 64), RATE, "libx264", {"g": "12", "bf": "2", "forced-idr": "1"})
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(draw_barcode(number), format="rgb24")
            if number in (2, 20, 22):
                frame.pict_type = PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = {packet.pts: packet.is_keyframe for packet in container.demux(stream) if packet.size}
    assert [number for number, time in enumerate(sorted(shown)) if shown[time]][:2] == [0, 2]
    for indices in ([0, 1, 2, 3], [0], [1, 21], [19, 20, 21, 22, 23], [39]):
        assert numbers(path, indices) == indices


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [
        ("a.h264", "libx264", RATE),
        ("a.264", "libx264", RATE),
        ("a.hevc", "libx265", RATE),
        # This one always has the rate of American television.
        ("a.h263", "h263", 30_000 / 1001),
        ("a.obu", "libsvtav1", None),
    ],
)
def test_a_bare_stream_is_read_by_opening_it_again(tmp_path: Path, name: str, codec: str, rate: float | None) -> None:
    options = {"g": "12"}
    if codec.startswith("libx26"):
        options["bf"] = "2"
    if codec == "libx265":
        options["x265-params"] = "log-level=none"
    path = write_video(tmp_path / name, codec, 40, options)
    assert numbers(path, [0, 13, 26, 39]) == [0, 13, 26, 39]
    if rate is not None:
        assert decode_video(path, 4, 144, 176).fps == pytest.approx(rate)
    decoded = decode_video(path, 4, 144, 176, start_seconds=1.0, end_seconds=1.4)
    numbered = [read_barcode(frame) for frame in decoded.frames]
    assert numbered == decoded.indices
    assert decoded.times_seconds == pytest.approx([index / decoded.fps for index in decoded.indices])


@pytest.mark.parametrize("padding", [b"", b"\0\0\0"])
@pytest.mark.parametrize("name", ["a.mjpeg", "a.jpg"])
def test_jpeg_images_of_one_size_behind_each_other_are_a_video(tmp_path: Path, name: str, padding: bytes) -> None:
    path, thumbnail = tmp_path / name, BytesIO()
    Image.fromarray(draw_barcode(99)).save(thumbnail, "JPEG")
    images = []
    for number in range(12):
        image = BytesIO()
        # The header holds an image of its own, whose end is not that of the whole.
        Image.fromarray(draw_barcode(number)).save(image, "JPEG", quality=95, comment=thumbnail.getvalue())
        images.append(image.getvalue() + padding)
    path.write_bytes(b"".join(images))
    assert media_kind(path) == "video"
    assert numbers(path, [0, 3, 7, 11]) == [0, 3, 7, 11]


@pytest.mark.parametrize("what", ["preview", "film", "stereo", "nothing"])
def test_what_cameras_put_behind_a_photo_makes_no_video_of_it(tmp_path: Path, what: str) -> None:
    path, photo = tmp_path / "photo.jpg", Image.fromarray(draw_barcode(5))
    if what == "stereo":
        photo.save(path, "MPO", save_all=True, append_images=[photo], quality=95)
    else:
        photo.save(path, quality=95)
    extra = BytesIO()
    if what == "preview":
        photo.resize((48, 32)).save(extra, "JPEG")
    elif what == "film":
        extra.write(write_video(tmp_path / "clip.mp4", "mpeg4", 3).read_bytes())
    path.write_bytes(path.read_bytes() + extra.getvalue())
    assert media_kind(path) == "image"


def draw_gif(path: Path, num_frames: int) -> bytes:
    frames = [Image.fromarray(draw_barcode(number)) for number in range(num_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path.read_bytes()


@pytest.mark.parametrize("position", ["end", "middle"])
@pytest.mark.parametrize(
    "extension",
    [
        b"\x21\xfe\x05hello\x00",
        b"\x21\xfe\x05hello\x00" * 3,
        b"\x21\xfe" + (b"\xff" + b"," * 255) * 20 + b"\x00",
        b"\x21\xff\x0bXMP DataXMP\x03abc\x00",
        b"\x21\xf9\x04\x00\x0a\x00\x00\x00",
    ],
    ids=["comment", "comments", "long", "application", "control"],
)
def test_what_else_a_gif_file_has_is_no_frame(tmp_path: Path, position: str, extension: bytes) -> None:
    path = tmp_path / "edited.gif"
    content = draw_gif(path, 5)
    place = len(content) - 1
    if position == "middle":
        # Each frame begins with its graphic control extension.
        place = content.rindex(b"\x21\xf9\x04")
    path.write_bytes(content[:place] + extension + content[place:])
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 5
    decoded = decode_video(path, 100, 64, 96)
    assert [read_barcode(frame) for frame in decoded.frames] == [0, 1, 2, 3, 4]
    assert decoded.times_seconds == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_the_frame_on_the_screen_stands_for_a_last_one_that_is_none(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.avi", "mpeg4", 20, {"g": "100"})
    path = tmp_path / "clip.avi"
    with av.open(str(whole)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for number, packet in enumerate(container.demux(stream)):
            if number == 19:
                # MPEG-4 Part 2, 6.2.5: a frame that is not coded, as encoders put behind two in one packet.
                last = av.Packet(b"\x00\x00\x01\xb6\x59\x9f")
                last.dts, last.pts, last.time_base = packet.dts, packet.pts, packet.time_base
                packet = last
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    assert numbers(path, [0, 18, 19]) == [0, 18, 18]


@pytest.mark.parametrize("suffix", ["avi", "mov"])
def test_colours_that_the_container_states_once_hold_for_all_frames(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"palette.{suffix}"
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (96, 64), RATE, "rawvideo")
        stream.pix_fmt = "pal8"
        for number in range(30):
            coloured = Image.fromarray(draw_barcode(number)).quantize(8)
            palette = np.full((256, 4), 255, np.uint8)
            colours = np.asarray(coloured.getpalette(), np.uint8).reshape(-1, 3)
            # Alpha, red, green, blue.
            palette[: len(colours), 1:] = colours
            frame = av.VideoFrame.from_ndarray((np.asarray(coloured), palette), format="pal8")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    decoded = decode_video(path, 10, 64, 96, start_seconds=1.0, end_seconds=2.0)
    assert [read_barcode(frame) for frame in decoded.frames] == list(range(10, 20))
    assert {corner_colours(frame) for frame in decoded.frames} == {CORNERS}


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_recordings_that_were_put_together_follow_each_other(tmp_path: Path, codec: str) -> None:
    part = write_video(tmp_path / "part.ts", codec, 30, {"g": "12", "bf": "2"})
    path = tmp_path / "together.ts"
    path.write_bytes(part.read_bytes() * 3)
    indices = [0, 7, 29, 30, 45, 59, 60, 89]
    assert numbers(path, indices) == [index % 30 for index in indices]
    decoded = decode_video(path, 90, 64, 96)
    assert decoded.times_seconds == pytest.approx([index / RATE for index in range(90)], abs=0.002)


def test_times_in_avi_are_those_of_showing_where_frames_are_decoded_in_another_order(tmp_path: Path) -> None:
    path, ticks = tmp_path / "clip.avi", [*range(10), *range(12, 40, 4), *range(40, 80, 9)]
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (96, 64), 20, "libx264", {"bf": "2", "x264-params": "b-adapt=0"})
        stream.codec_context.time_base = Fraction(1, 20)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(draw_barcode(number), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.has_b_frames
    decoded = decode_video(path, 100, 64, 96)
    assert [read_barcode(frame) for frame in decoded.frames] == list(range(len(ticks)))
    # The file does not say when the last two, which wait for nothing, are shown.
    assert decoded.times_seconds[:-2] == pytest.approx([tick / 20 for tick in ticks[:-2]])
    assert decoded.times_seconds == sorted(decoded.times_seconds)


def test_uncompressed_video_with_a_header_of_text_is_a_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.y4m"
    content = b"YUV4MPEG2 W96 H64 F10:1 Ip A1:1 C444\n"
    for number in range(20):
        frame = av.VideoFrame.from_ndarray(draw_barcode(number), format="rgb24").reformat(format="yuv444p")
        content += b"FRAME\n" + frame.to_ndarray().tobytes()
    path.write_bytes(content)
    assert numbers(path, [0, 9, 19]) == [0, 9, 19]
    assert media_kind(path) == "video"


@pytest.mark.parametrize("suffix", ["avi", "mov"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_frames_of_motion_jpeg_are_upright_as_their_exif_data_say(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    path = tmp_path / f"clip.{suffix}"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    upright = []
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (96, 64), RATE, "mjpeg")
        stream.pix_fmt = "yuvj420p"
        for number in range(3):
            jpeg = BytesIO()
            Image.fromarray(draw_barcode(number)).save(jpeg, "JPEG", exif=exif, quality=95)
            upright.append(np.asarray(ImageOps.exif_transpose(Image.open(jpeg)).convert("RGB").resize((96, 64))))
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, RATE)
            packet.is_keyframe = True
            container.mux(packet)
    decoded = decode_video(path, 3, 64, 96)
    assert np.abs(decoded.frames.astype(int) - np.stack(upright)).mean() < 6


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
    if matrix == 10:
        # The same bytes in the other kind of BT.2020, as FFmpeg took it up to version 7.
        plain = change_header(plain, tmp_path / "matrix9.h264", "matrix_coefficients=9")
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
