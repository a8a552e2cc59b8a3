"""What people pass for a file: each form gives what the path gives, or says in one line why it cannot."""

from __future__ import annotations

import base64
import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import MakeAudio, MakeVideo
from video_llama.errors import MediaError, NoAudioTrackError
from video_llama.media.sources import describe_source, is_file, open_source
from video_llama.processor import load_processor, process_audio, process_images, process_video

PROCESSOR = load_processor(image_size=32, n_frms=4)
MANY_BYTES = 10_000_000


class Pathlike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


def as_data_address(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def at_its_end(path: Path) -> io.BytesIO:
    file = io.BytesIO()
    file.write(path.read_bytes())
    return file


FORMS: dict[str, Callable[[Path], Any]] = {
    "text": str,
    "Path": Path,
    "os.PathLike of bytes": Pathlike,
    "file address": Path.as_uri,
    "file address of this machine": lambda path: f"file://localhost{path}",
    "file address without slashes": lambda path: f"file:{path}",
    "file address that is not quoted": lambda path: f"file://{path}",
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "BytesIO that was just written": at_its_end,
    "open file": lambda path: path.open("rb"),
    "unbuffered file": lambda path: path.open("rb", buffering=0),
    "data address": as_data_address,
    "row of bytes": lambda path: {"bytes": path.read_bytes(), "path": "name.mp4"},
    "row of a path": lambda path: {"bytes": None, "path": str(path)},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_video_gives_what_its_path_gives(form: str, make_video: MakeVideo) -> None:
    path = make_video("a b%20ü.mp4", audio=True)
    frames, sound = PROCESSOR.process_video(path)
    given = FORMS[form](path)
    read, heard = process_video(given, PROCESSOR)
    np.testing.assert_array_equal(read.frames, frames.frames)
    assert read.times_seconds == frames.times_seconds
    assert sound is not None
    assert heard is not None
    assert torch.equal(heard.values, sound.values)
    assert "/proc/" not in f"{read!r} {heard!r}"
    assert torch.equal(process_audio(FORMS[form](path), PROCESSOR).values, sound.values)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_an_image_gives_what_its_path_gives(form: str, tmp_path: Path) -> None:
    path = tmp_path / "still.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path)
    image = process_images(FORMS[form](path), PROCESSOR)
    np.testing.assert_array_equal(image.frames, PROCESSOR.process_image(path).frames)


def test_a_tilde_is_the_home_of_the_user(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    for source in ("~/clip.mp4", Path("~/clip.mp4")):
        assert PROCESSOR.process_video(source)[0].source == str(path)


def test_files_in_archives_are_open_files(make_video: MakeVideo, tmp_path: Path) -> None:
    path = make_video()
    expected = PROCESSOR.process_video(path)[0].frames
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "clip.mp4")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(path, "clip.mp4")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("clip.mp4") as member:
        np.testing.assert_array_equal(PROCESSOR.process_video(member)[0].frames, expected)
    with tarfile.open(tmp_path / "a.tar") as archive:
        np.testing.assert_array_equal(PROCESSOR.process_video(archive.extractfile("clip.mp4"))[0].frames, expected)


def test_an_open_file_stays_where_it_stands(make_video: MakeVideo) -> None:
    with make_video().open("rb") as file:
        file.seek(7)
        first = PROCESSOR.process_video(file)[0]
        assert file.tell() == 7
        np.testing.assert_array_equal(PROCESSOR.process_video(file)[0].frames, first.frames)


def test_nothing_of_what_was_in_memory_stays_on_the_disk(make_video: MakeVideo, tmp_path: Path) -> None:
    content = make_video().read_bytes()
    with open_source(content) as file:
        assert Path(file.path).read_bytes() == content
    assert not os.path.exists(file.path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        PROCESSOR.process_video(content)
    assert len(os.listdir("/proc/self/fd")) <= before + 2 if before else True


def test_without_files_in_memory_a_temporary_one_serves(make_video: MakeVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    content = make_video().read_bytes()
    with open_source(content) as file:
        assert Path(file.path).read_bytes() == content
    assert not os.path.exists(file.path)


REFUSED: dict[str, tuple[Any, str]] = {
    "empty text": ("", r"'': an empty path"),
    "spaces": ("  ", "an empty path"),
    "web address": (
        "https://example.com/a.mp4?x=1",
        r"an address, not a file \(add --allow-urls",
    ),
    "web address as a path": (Path("http://example.com/a.mp4"), "pass it as text, not as pathlib.Path"),
    "bucket": ("s3://bucket/a.mp4", r"an address \(s3://\), not a file \(download it first\)"),
    "camera": ("rtsp://192.168.0.7/stream", r"an address \(rtsp://\)"),
    "another machine": ("file://server/share/a.mp4", "a file on another machine"),
    "data without a comma": ("data:video/mp4;base64", "without a comma"),
    "damaged data": ("data:video/mp4;base64,A", "damaged base64"),
    "empty data": ("data:,", "empty"),
    "text of a data address": ("data:text/plain,hello", "a text file, not a video"),
    "base64": (base64.b64encode(bytes(MANY_BYTES)).decode(), r"base64 text, not a path \(give bytes"),
    "long text": ("What happens in this video? " * 10_000, "text, not a path"),
    "text of two lines": ("a\nb", "text, not a path"),
    "many damaged bytes": (b"\x07" * MANY_BYTES, "not a media file, or damaged beyond reading"),
    "text in bytes": (b"hello", "bytes of 5 bytes: .*a text file"),
    "a path in bytes": (b"/tmp/clip.mp4", "a text file"),
    "no bytes": (b"", "bytes of 0 bytes: empty"),
    "empty file": (io.BytesIO(), "BytesIO: empty"),
    "file opened as text": (io.StringIO("x"), r"opened as text \(open it with open\(path, 'rb'\)"),
    "row without a file": ({"bytes": None, "path": None}, "no media can be read from that"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_file_is_refused_in_a_short_line_with_the_reason(form: str) -> None:
    source, reason = REFUSED[form]
    for process in (PROCESSOR.process_video, PROCESSOR.process_image, PROCESSOR.process_audio):
        with pytest.raises(MediaError) as caught:
            process(source)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)
        assert len(pickle.dumps(caught.value)) < 2000
    with pytest.raises(MediaError, match=reason):
        PROCESSOR.process_video(source)


def test_a_closed_file_and_one_that_fails_are_media_errors(make_video: MakeVideo) -> None:
    file = make_video().open("rb")
    file.close()
    with pytest.raises(MediaError, match=r"clip.mp4: the open file cannot be read: "):
        PROCESSOR.process_video(file)

    class Failing(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(MediaError, match="Failing: the open file cannot be read: Input/output error"):
        PROCESSOR.process_video(Failing())


@pytest.mark.parametrize("source", [7, None, object(), (n for n in range(3)), {}, {"name": "a.mp4"}, set(), 1.5])
def test_objects_of_other_kinds_are_refused_by_their_type(source: Any) -> None:
    for process in (PROCESSOR.process_video, PROCESSOR.process_image, PROCESSOR.process_audio):
        with pytest.raises(MediaError) as caught:
            process(source)
        assert caught.value.reason
        assert caught.value.hint


def test_damage_in_memory_is_told_with_the_name_of_the_source(make_video: MakeVideo, make_audio: MakeAudio) -> None:
    content = make_video(num_frames=30).read_bytes()
    with pytest.raises(MediaError, match=rf"^bytes of {len(content) // 2} bytes: the file is truncated"):
        PROCESSOR.process_video(content[: len(content) // 2])
    with pytest.raises(NoAudioTrackError, match=r"^BytesIO: no sound track"):
        PROCESSOR.process_audio(io.BytesIO(content))
    with pytest.raises(MediaError, match=r"^BytesIO: sound only, no video"):
        PROCESSOR.process_video(io.BytesIO(make_audio().read_bytes()))


def test_a_file_whose_name_looks_like_an_address_is_a_file(
    make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_video().read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in ("clip:1.mp4", "~clip.mp4", "a\nb.mp4"):
        Path(name).write_bytes(content)
        assert PROCESSOR.process_video(name)[0].source == name


def test_images_and_arrays_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    with Image.open(path) as opened:
        for value in (opened, Image.new("L", (2, 2)), np.zeros(3), torch.zeros(3), {"array": 1, "path": "x"}, [path]):
            assert not is_file(value)
    assert describe_source(np.zeros(3)) == "clip"
