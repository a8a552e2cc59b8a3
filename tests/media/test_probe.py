"""What files are before they are decoded: kinds, signatures, truncation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import MakeAudio, MakeVideo
from video_llama.errors import MediaError
from video_llama.media.containers import check_media_file, describe_content, find_truncation, media_kind

Cut = Callable[[Path, int], Path]


@pytest.fixture
def cut(tmp_path: Path) -> Cut:
    """Copy all but the last bytes of a file."""

    def copy(path: Path, num_bytes: int) -> Path:
        target = tmp_path / f"cut{path.suffix}"
        target.write_bytes(path.read_bytes()[:-num_bytes])
        return target

    return copy


def save_image(path: Path, **options: object) -> Path:
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path, **options)
    return path


def test_a_usable_file_is_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert check_media_file("clip.mp4") == str(tmp_path / "clip.mp4")


def test_what_is_no_readable_file_is_named_with_the_cause(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty.mp4", tmp_path / "pipe.mp4"
    empty.touch()
    os.mkfifo(pipe)
    causes = {
        tmp_path / "none.mp4": "no such file",
        tmp_path: "a folder",
        empty: "the file is empty",
        pipe: "not a regular file",
    }
    for path, cause in causes.items():
        with pytest.raises(MediaError, match=cause) as caught:
            check_media_file(path)
        assert caught.value.path == str(path)


def test_a_file_without_permission_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"x")
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(MediaError, match="no permission"):
        check_media_file(tmp_path / "clip.mp4")


def test_an_address_is_never_fetched() -> None:
    with pytest.raises(MediaError, match="no such file"):
        check_media_file("https://localhost/clip.mp4")


@pytest.mark.parametrize(
    ("head", "description"),
    [
        (b"\x89PNG\r\n\x1a\n", "a still image (PNG)"),
        (b"\xff\xd8\xff\xe0", "a still image (JPEG)"),
        (b"BM\x00\x00", "a still image (BMP)"),
        (b"II*\x00", "a still image (TIFF)"),
        (b"MM\x00*", "a still image (TIFF)"),
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "a still image (WebP)"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"%PDF-1.7", "a PDF document"),
        (b"#EXTM3U\nhttp://localhost/a.ts\n", "a playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "a playlist"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer, not the file itself"),
        (b"<!DOCTYPE html><html>", "a text file"),
        ("görüntü yok\n".encode(), "a text file"),
        (b"a" * 1023 + "ü".encode(), "a text file"),
        (b"RIFF\x10\x00\x00\x00WAVEfmt ", ""),
        (b"\x00\x00\x00\x20ftypisom", ""),
        (b"text\x00with zeros", ""),
        (b"text \xff\xfe that is not UTF-8", ""),
    ],
)
def test_first_bytes_tell_what_a_file_is(tmp_path: Path, head: bytes, description: str) -> None:
    path = tmp_path / "file.mp4"
    path.write_bytes(head)
    assert describe_content(str(path)) == description


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov", "clip.mkv", "clip.avi"])
def test_a_whole_video_is_not_truncated_and_a_cut_one_is(make_video: MakeVideo, cut: Cut, name: str) -> None:
    path = make_video(name, codec="mpeg4" if name.endswith("avi") else "libx264", num_frames=30)
    size = path.stat().st_size
    assert find_truncation(str(path)) == ""
    half = cut(path, size // 2)
    message = find_truncation(str(half))
    assert message.startswith(f"the file is truncated: {half.stat().st_size} of ")
    assert abs(int(message.split()[6]) - size) <= 16


@pytest.mark.parametrize(("name", "codec"), [("tone.wav", "pcm_s16le"), ("tone.aiff", "pcm_s16be")])
def test_a_whole_sound_is_not_truncated_and_a_cut_one_is(
    make_audio: MakeAudio, cut: Cut, name: str, codec: str
) -> None:
    path = make_audio(name, codec=codec)
    assert find_truncation(str(path)) == ""
    assert find_truncation(str(cut(path, 1))) == ""  # some programs count a padding byte
    assert "truncated" in find_truncation(str(cut(path, 1000)))


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00" + b"\x00\x00\x00\x00mdat" + b"x" * 50,  # to the end of the file
        b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00" + b"\x7f\x00\x00\x00junk",  # what some programs add
        b"RIFF\xff\xff\xff\xffWAVEfmt " + b"x" * 50,  # written to a pipe
        b"\x1aE\xdf\xa3\x80\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" + b"x" * 50,  # a live recording
        b"\x1aE\xdf\xa3\x80\xec\x81x" + b"x" * 50,  # no segment
        b"\x1aE\xdf\xa3\xff" + b"x" * 50,  # a header of unknown size
        b"\x1aE\xdf\xa3",
        b"anything else",
        b"x",
    ],
)
def test_a_file_that_declares_no_size_is_not_called_truncated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    assert find_truncation(str(path)) == ""


def test_a_64_bit_box_length_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    path.write_bytes(b"\x00\x00\x00\x08free\x00\x00\x00\x01mdat" + (500).to_bytes(8, "big") + b"x" * 100)
    assert find_truncation(str(path)) == "the file is truncated: 124 of 508 bytes are there"


def test_the_kind_comes_from_the_content_not_from_the_name(
    make_video: MakeVideo, make_audio: MakeAudio, tmp_path: Path
) -> None:
    kinds = {
        make_video("silent.mp4"): "video",
        make_video("sounding.mp4", audio=True): "video",
        make_video("moving.gif", codec="gif"): "video",
        make_audio("tone.mp3", codec="libmp3lame"): "audio",
        make_audio("tone.mp4", codec="aac"): "audio",
        save_image(tmp_path / "still.mp4", format="PNG"): "image",
        save_image(tmp_path / "still.webp"): "image",
    }
    assert {path: media_kind(path) for path in kinds} == kinds


@pytest.mark.parametrize("content", [b"only text\n", b"\x00\x01\x02\x03" * 300])
def test_the_kind_of_a_file_that_is_no_media_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"notes\.mp4: (a text file, not a video|not a media file)"):
        media_kind(path)
