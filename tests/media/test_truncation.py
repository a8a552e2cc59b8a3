"""Files that were cut, in the formats whose outer size tells nothing; and times that no recording has."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MakeAudio, MakeVideo
from video_llama.errors import MediaError
from video_llama.media import pyav_reader
from video_llama.media.containers import find_truncation
from video_llama.media.image import load_image
from video_llama.processor.builders import load_processor, process_audio, process_video


def draw_animation(path: Path, num_frames: int = 6) -> Path:
    """Noise, so that no frame is like the one before it."""
    pixels = np.random.default_rng(0).integers(0, 255, (num_frames, 40, 40, 3), dtype=np.uint8)
    first, *others = map(Image.fromarray, pixels)
    first.save(path, save_all=True, append_images=others, duration=100)
    return path


def make_long_audio(make_audio: MakeAudio, name: str) -> Path:
    codec = {"mp3": "libmp3lame", "ogg": "libopus", "oga": "flac"}[name.rsplit(".", maxsplit=1)[-1]]
    rate_hz = 48_000 if codec == "libopus" else 16_000
    return make_audio(name, seconds=20, rate_hz=rate_hz, codec=codec)


def cut_at(path: Path, size: int) -> Path:
    cut = path.with_name(f"cut{size}{path.suffix}")
    cut.write_bytes(path.read_bytes()[:size])
    return cut


def test_every_cut_of_an_animated_gif_is_noticed(tmp_path: Path) -> None:
    path = draw_animation(tmp_path / "a.gif")
    size = path.stat().st_size
    assert find_truncation(str(path)) == ""
    assert len(process_video(path, load_processor(image_size=32))[0]) > 0
    for length in [*range(20, size, size // 50), size - 1]:
        with pytest.raises(MediaError):
            process_video(cut_at(path, length), load_processor(image_size=32))


def test_a_gif_that_was_cut_behind_its_first_frame_is_no_still_image(tmp_path: Path) -> None:
    path, still = draw_animation(tmp_path / "a.gif"), tmp_path / "still.gif"
    Image.open(path).save(still)
    assert load_image(still).size == (40, 40)
    # The second frame's header alone is gone.
    second = path.read_bytes().index(b"\x21\xf9", still.stat().st_size - 60)
    with pytest.raises(MediaError, match="truncated"):
        load_image(cut_at(path, second + 2))


@pytest.mark.parametrize("rest", [b"\0\0", b"\x3b", b"a note of some program"])
def test_what_stands_behind_the_end_of_a_gif_does_not_matter(tmp_path: Path, rest: bytes) -> None:
    path = draw_animation(tmp_path / "a.gif")
    path.write_bytes(path.read_bytes() + rest)
    assert find_truncation(str(path)) == ""


def test_a_gif_of_tiny_blocks_costs_no_time_without_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\x01x" * 5_000_000)
    # The decoder's own business: it has no image.
    assert find_truncation(str(path)) == ""


@pytest.mark.parametrize("name", ["tone.mp3", "tone.ogg", "tone.oga"])
def test_a_whole_audio_file_is_whole_and_a_cut_one_is_not(make_audio: MakeAudio, name: str) -> None:
    path = make_long_audio(make_audio, name)
    size = path.stat().st_size
    assert find_truncation(str(path)) == ""
    random_place = random.Random(name)
    for _ in range(20):
        length = random_place.randrange(5000, size - 5000)
        with pytest.raises(MediaError, match="truncated"):
            process_audio(cut_at(path, length), load_processor())


def test_an_ogg_file_that_ends_with_a_whole_page_is_a_live_recording(make_audio: MakeAudio) -> None:
    path = make_long_audio(make_audio, "tone.ogg")
    last_page = path.read_bytes().rindex(b"OggS")
    assert find_truncation(str(cut_at(path, last_page))) == ""
    for begun in (1, 3, 4, 20, 40):
        assert "truncated" in find_truncation(str(cut_at(path, last_page + begun)))


def test_tags_around_an_mp3_do_not_matter(make_audio: MakeAudio) -> None:
    path = make_long_audio(make_audio, "tone.mp3")
    content = path.read_bytes()
    start = content.index(b"\xff\xf3")
    assert content[:3] == b"ID3"
    for variant in (
        content[start:],
        content + b"TAG" + bytes(125),
        b"ID3\x04\0\0\0\0\x10\0" + bytes(2048) + content[start:],
    ):
        path.write_bytes(variant)
        assert find_truncation(str(path)) == ""
        path.write_bytes(variant[: len(variant) // 2])
        assert "truncated" in find_truncation(str(path))


def test_an_mp3_without_a_header_of_its_encoder_does_not_tell(make_audio: MakeAudio) -> None:
    path = make_long_audio(make_audio, "tone.mp3")
    content = path.read_bytes()
    path.write_bytes(content[content.index(b"\xff\xf3", content.index(b"Info") + 4) :])
    assert find_truncation(str(path)) == ""
    assert len(process_audio(path, load_processor())) > 0


def test_frames_that_last_for_years_are_a_damaged_header(make_video: MakeVideo) -> None:
    path = make_video("clip.avi", codec="mpeg4")
    content = bytearray(path.read_bytes())
    # Behind name, size, kind, codec, flags, priority and delay of the first stream: ticks and how many a second.
    place = content.index(b"strh") + 28
    scale, rate = struct.unpack("<2I", content[place : place + 8])
    assert rate / scale == 10
    content[place : place + 8] = struct.pack("<2I", 10**9, 1)
    path.write_bytes(content)
    with pytest.raises(MediaError, match="its times are damaged"):
        process_video(path, load_processor(image_size=32))


@pytest.mark.parametrize(
    ("limit", "reason"), [("_MAX_ANIMATION_FRAME", "too large"), ("_MAX_ANIMATION", "too many frames")]
)
def test_an_animation_of_huge_frames_is_refused_before_they_are_put_together(
    limit: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = draw_animation(tmp_path / "a.webp")
    assert len(process_video(path, load_processor(image_size=32))[0]) > 0
    monkeypatch.setattr(pyav_reader, limit, 40 * 40 - 1)
    with pytest.raises(MediaError, match=reason):
        process_video(path, load_processor(image_size=32))
