"""Files that are well-formed and yet not what most encoders write, or damaged in ways that are easy to miss."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from tests.conftest import (
    MakeAudio,
    MakeVideo,
    add_audio_stream,
    add_video_stream,
    draw_frame,
    draw_tone,
    encode_audio,
    frame_number,
    join_videos,
)
from tests.helpers.damage import replace_bytes
from video_llama.errors import MediaError
from video_llama.media.containers import limit_frames, media_kind
from video_llama.media.decode import decode_video
from video_llama.processor.audio_features import decode_audio

RATE = 16_000


def sampled(path: Path, num_frames: int = 6, reader: str = "pyav") -> tuple[list[int], list[int]]:
    """The indices, and the index drawn into each frame."""
    decoded = decode_video(path, num_frames, 48, 64, reader=reader)
    return decoded.indices, [frame_number(frame) for frame in decoded.frames]


@pytest.fixture
def song(tmp_path: Path) -> Path:
    """A sound with a cover picture."""
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = add_video_stream(container, (32, 32), 1, "mjpeg")
        cover.pix_fmt = "yuvj420p"
        cover.disposition = Disposition.attached_pic.value
        sound = add_audio_stream(container, 1, RATE, "aac")
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux([*cover.encode(frame), *cover.encode()])
        encode_audio(container, sound, draw_tone(1.0, RATE, 1))
    return path


def test_a_cover_picture_makes_no_video_of_a_sound(song: Path) -> None:
    assert media_kind(song) == "audio"
    assert decode_audio(song).samples.shape[1] == pytest.approx(RATE, abs=2100)
    with pytest.raises(MediaError, match="sound only, no video"):
        sampled(song)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("clip.ts", "mpeg2video", {}),
        ("clip.ts", "libx264", {"g": "6", "bf": "2"}),
        ("clip.mpg", "mpeg2video", {"g": "6", "bf": "2"}),
        ("clip.avi", "mpeg4", {"bf": "2"}),
        ("clip.avi", "libx264", {"g": "6", "bf": "2"}),
    ],
)
def test_formats_without_reliable_times_are_exact_or_refused_where_frames_would_be_wrong(
    make_video: MakeVideo, name: str, codec: str, options: dict[str, str]
) -> None:
    path = make_video(name, num_frames=24, codec=codec, options=options, fps=25)
    assert sampled(path) == ([0, 4, 8, 12, 16, 20],) * 2
    with pytest.raises(MediaError, match=r"decord gives wrong frames of \w+ files \(use the video reader 'pyav'\)"):
        sampled(path, reader="decord")


def test_frames_that_the_edit_list_cuts_away_are_not_counted(make_video: MakeVideo) -> None:
    path = make_video(num_frames=24, fps=25, options={"g": "12", "bf": "0"})
    content = bytearray(path.read_bytes())
    media_time = content.index(b"elst") + 16
    with av.open(str(path)) as container:
        frame_time = int(1 / (25 * container.streams.video[0].time_base))
    content[media_time : media_time + 4] = (5 * frame_time).to_bytes(4, "big")
    path.write_bytes(content)
    assert sampled(path) == ([0, 3, 6, 9, 12, 15], [5, 8, 11, 14, 17, 20])


def test_a_live_recording_that_declares_no_length_is_read(make_video: MakeVideo) -> None:
    path = make_video("live.mkv", num_frames=24, container_options={"live": "1"})
    assert sampled(path) == ([0, 4, 8, 12, 16, 20],) * 2


def test_frame_sizes_may_change_midway(tmp_path: Path) -> None:
    path, content = tmp_path / "clip.ts", b""
    for number, size in enumerate([(64, 48), (96, 64)]):
        with av.open(str(path), "w", format="mpegts") as container:
            stream = add_video_stream(container, size, 25, "mpeg2video")
            for index in range(6):
                frame = av.VideoFrame.from_ndarray(draw_frame(6 * number + index, *size), format="rgb24")
                frame.pts = 6 * number + index
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        content += path.read_bytes()
    path.write_bytes(content)
    indices, drawn = sampled(path)
    assert indices == drawn == [0, 2, 4, 6, 8, 10]


def test_a_file_without_declared_size_that_ends_in_the_middle_of_a_frame_is_cut_short(make_video: MakeVideo) -> None:
    path = make_video("clip.flv", codec="flv1")
    with av.open(str(path)) as container:
        last_end = max(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: last_end - 10])
    with pytest.raises(MediaError, match=r"clip\.flv: the video stream is damaged or cut short"):
        sampled(path)


def test_a_codec_that_nobody_knows_is_named_as_the_cause(make_video: MakeVideo) -> None:
    path = replace_bytes(make_video("clip.mkv"), b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ")
    with pytest.raises(MediaError, match=r"clip\.mkv: its video codec is unknown"):
        sampled(path)


def test_a_title_in_another_encoding_is_no_reason_to_fail(tmp_path: Path) -> None:
    path = tmp_path / "old.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Gunes_dogarken"
        encode_audio(container, add_audio_stream(container, 1, RATE, "pcm_s16le"), draw_tone(1.0, RATE, 1))
    replace_bytes(path, b"Gunes_dogarken", "G\xfcne\xfe_do\xf0arken".encode("latin-1"))
    assert decode_audio(path).samples.shape == (1, RATE)


def test_frames_too_large_for_the_memory_are_refused(make_video: MakeVideo) -> None:
    clip = make_video()
    with limit_frames(64 * 48 - 1), pytest.raises(MediaError, match=r"clip\.mp4: frames of 64x48 are too large"):
        sampled(clip)
    assert sampled(clip)


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_frames_that_grow_too_large_midway_are_never_decoded(
    suffix: str, make_video: MakeVideo, tmp_path: Path
) -> None:
    path = join_videos(tmp_path / f"growing.{suffix}", make_video("a.h264"), make_video("b.h264", size=(256, 192)))
    assert sampled(path)
    with limit_frames(64 * 48), pytest.raises(MediaError, match=r"growing\.\w+: "):
        sampled(path)


def test_a_video_stream_without_frames_is_named_as_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "none.avi"
    with av.open(str(path), "w") as container:
        add_video_stream(container, (64, 48), 10, "libx264")
        container.start_encoding()
    with pytest.raises(MediaError, match=r"none\.avi: the video has no frames"):
        sampled(path)


def test_decords_errors_come_without_its_source_positions(make_video: MakeVideo) -> None:
    with pytest.raises(MediaError, match="decord cannot decode it") as caught:
        decode_video(make_video(), 2, 48, 48, reader="decord")
    assert "/src/" not in str(caught.value)
    assert caught.value.reason.count(":") == 1


@pytest.mark.parametrize("channels", [(2, 1), (1, 2)])
def test_a_broadcast_may_change_its_channels_midway(make_audio: MakeAudio, channels: tuple[int, int]) -> None:
    parts = [make_audio(f"{count}.ts", channels=count, codec="mp2").read_bytes() for count in channels]
    path = make_audio("both.ts", codec="mp2")
    path.write_bytes(b"".join(parts))
    waveform = decode_audio(path)
    assert waveform.samples.shape == (channels[0], pytest.approx(2 * RATE, abs=1000))
    assert float(waveform.samples[0, RATE + 4000 :].abs().max()) > 0.2


def test_a_flac_file_cut_between_two_blocks_is_truncated(make_audio: MakeAudio) -> None:
    path = make_audio("tone.flac", codec="flac", seconds=2.0)
    with av.open(str(path)) as container:
        last_block = max(packet.pos for packet in container.demux(audio=0) if packet.size)
    path.write_bytes(path.read_bytes()[:last_block])
    with pytest.raises(MediaError, match=r"tone\.flac: the file is truncated: \d+ of 32000 samples are there"):
        decode_audio(path)


@pytest.mark.parametrize("times_ms", [[0, 33, 66, 1500, 2500, 3800], [0, 1, 3799, 3800]])
def test_a_recording_with_fewer_frames_than_its_header_says_keeps_its_length(
    tmp_path: Path, times_ms: list[int]
) -> None:
    path = tmp_path / "webcam.webm"
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (64, 48), 30, "libvpx")
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(draw_frame(number, 64, 48), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 30
    decoded = decode_video(path, len(times_ms), 48, 64)
    assert decoded.times_seconds[-1] == pytest.approx(3.8)
