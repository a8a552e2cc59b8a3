"""No error of FFmpeg, Pillow or the system leaves: each becomes a `MediaError` with the file, the reason and a hint.

A stand-in for PyAV's objects raises at one place of the package after the other: wherever it calls PyAV or reads what
PyAV says of a file.
"""

from __future__ import annotations

import builtins
import enum
import errno
import os
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
import pytest
from PIL import Image, features

import video_llama
from tests.conftest import MakeAudio, MakeVideo
from video_llama.demo.limits import Limits
from video_llama.errors import MediaError, VideoLlamaError
from video_llama.media import audio_track, frame_scaling, pyav_reader
from video_llama.media.containers import check_media_file, describe_content, media_kind, translate_errors
from video_llama.processor.builders import load_processor
from video_llama.processor.clips import ClipReader
from video_llama.processor.media_processor import MediaProcessor

PACKAGE = str(Path(video_llama.__file__).parent)
HERE = Path(__file__)


def kinds_of_errors() -> list[Exception]:
    """One of each kind that PyAV has, of the system, and of memory."""
    found: list[Exception] = []
    for name in vars(av.error).values():
        if isinstance(name, type) and issubclass(name, av.FFmpegError):
            found.append(name(1, f"a message of {name.__name__}"))
    found += [OSError(5, "Input/output error"), PermissionError(13, "Permission denied"), MemoryError()]
    found.append(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"))
    return found


KINDS = kinds_of_errors()


@dataclass
class Sabotage:
    """Counts the uses of PyAV by their places in the package, and raises at one of them."""

    places: dict[str, int] = field(default_factory=dict)
    raise_at: str = ""
    error: Exception = field(default_factory=MemoryError)

    def use(self, name: str) -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename == __file__:
            frame = frame.f_back
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE):
            return
        place = f"{file.removeprefix(PACKAGE)}:{frame.f_lineno} {name}"
        self.places[place] = self.places.get(place, 0) + 1
        if place == self.raise_at:
            raise self.error

    def wrap(self, value: Any) -> Any:
        """Return a stand-in for what belongs to PyAV; plain values as they are."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.wrap, value))
        # PyAV 19 has a class of its own for fractions.
        if value is None or type(value).__name__ == "AVRational":
            return value
        if isinstance(value, (int, float, str, bytes, Fraction, enum.Enum, np.ndarray, StandIn)):
            return value
        return StandIn(value, self)


class StandIn:
    """Does what the object does that it stands for, unless it is to raise."""

    def __init__(self, value: Any, sabotage: Sabotage) -> None:
        object.__setattr__(self, "_value", value)
        object.__setattr__(self, "_sabotage", sabotage)

    @property
    def __class__(self) -> Any:
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        self._sabotage.use(name)
        return self._sabotage.wrap(getattr(self._value, name))

    def __setattr__(self, name: str, value: Any) -> None:
        self._sabotage.use(f"{name} =")
        setattr(self._value, name, bare(value))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._sabotage.use("()")
        values = {name: bare(value) for name, value in kwargs.items()}
        return self._sabotage.wrap(self._value(*map(bare, args), **values))

    def __iter__(self) -> Iterator[Any]:
        self._sabotage.use("iter")
        for value in self._value:
            self._sabotage.use("next")
            yield self._sabotage.wrap(value)

    def __next__(self) -> Any:
        self._sabotage.use("next")
        return self._sabotage.wrap(next(self._value))

    def __enter__(self) -> Any:
        self._sabotage.use("enter")
        self._value.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        self._value.__exit__(*error)
        self._sabotage.use("exit")

    def __len__(self) -> int:
        return len(self._value)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __getitem__(self, key: Any) -> Any:
        self._sabotage.use("[]")
        return self._sabotage.wrap(self._value[key])

    def __bytes__(self) -> bytes:
        return bytes(self._value)

    def __eq__(self, other: Any) -> Any:
        return self._value == bare(other)

    def __hash__(self) -> int:
        return hash(self._value)


def bare(value: Any) -> Any:
    if type(value) is StandIn:
        return value._value
    if type(value) in (list, tuple):
        return type(value)(map(bare, value))
    return value


@contextmanager
def in_place_of_pyav(sabotage: Sabotage) -> Iterator[None]:
    """Let the files of the package use stand-ins for what they import of PyAV."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (av, "open"),
            (frame_scaling, "Graph"),
            (pyav_reader, "VideoFrame"),
            (audio_track, "AudioResampler"),
        ):
            patch.setattr(module, name, StandIn(getattr(module, name), sabotage))
        yield


def read_everything(path: Path, media: MediaProcessor) -> None:
    """Use a file in each of the ways that the package has."""
    ways: list[Callable[[], object]] = [
        lambda: media_kind(path),
        lambda: media.process_video(path, num_frames=3),
        lambda: media.process_audio(path),
        lambda: media.process_image(path),
        lambda: Limits().check_file(path),
        lambda: ClipReader(media, window_seconds=0.5)(path),
    ]
    failures = []
    for way in ways:
        try:
            way()
        except (VideoLlamaError, MemoryError) as error:
            failures.append(error)
    for failure in failures:
        if isinstance(failure, MediaError):
            assert failure.path == str(path)
            assert failure.reason


def draw_animation(path: Path) -> Path:
    frames = [Image.new("RGB", (16, 16), (value, 0, 0)) for value in (0, 90, 180)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


def sabotage_each_place(path: Path, kinds_at_each: int) -> int:
    """Read a file as often as there are places, and let PyAV fail at another one each time."""
    media, seen = load_processor(image_size=32), Sabotage()
    with in_place_of_pyav(seen):
        read_everything(path, media)
    source = random.Random(0)
    for place in seen.places:
        for error in source.sample(KINDS, kinds_at_each):
            with in_place_of_pyav(Sabotage(raise_at=place, error=error)):
                read_everything(path, media)
            # One error serves many readings: what it went through would stay open with it.
            error.__traceback__ = error.__context__ = None
    return len(seen.places)


def test_wherever_pyav_fails_a_media_error_leaves(make_video: MakeVideo) -> None:
    assert sabotage_each_place(make_video(num_frames=6, audio=True), 1) > 80


def test_wherever_pyav_fails_on_an_animation_a_media_error_leaves(tmp_path: Path) -> None:
    assert sabotage_each_place(draw_animation(tmp_path / "animation.png"), 6) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_wherever_pyav_fails_in_any_way_a_media_error_leaves(name: str, make_video: MakeVideo) -> None:
    assert sabotage_each_place(make_video(name, num_frames=6, audio=True), 4) > 40


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_the_system_may_fail_wherever_a_file_is_opened(
    number: int, make_video: MakeVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [make_video(), draw_animation(tmp_path / "animation.webp"), tmp_path / "still.png"]
    Image.new("RGB", (9, 9)).save(files[-1])
    real_open, opened, fail_at = builtins.open, 0, 0

    def failing(file: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal opened
        if file in map(str, files):
            opened += 1
            if opened == fail_at:
                raise OSError(number, os.strerror(number))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", failing)
    media = load_processor(image_size=32)
    for file in files:
        for place in range(1, 8):
            opened, fail_at = 0, place
            read_everything(file, media)


CLIPS = ["h264.mp4", "mpeg4.avi", "h264.mkv", "mpeg2video.ts", "vp9.webm"]
TONES = ["tone.wav", "tone.flac", "tone.mp3", "tone.ogg"]
STILLS = ["a.png", "a.jpg", "a.webp", "a.gif", "a.tiff", "a.bmp", "a.tga", *["a.avif"] * features.check("avif")]
IMAGES = [*STILLS, "moving.png", "moving.webp", "moving.gif"]


def draw_image(path: Path) -> Path:
    if path.stem == "moving":
        return draw_animation(path)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", [*CLIPS, *TONES, *IMAGES])
def test_flipped_bytes_give_a_result_or_a_media_error(
    name: str, make_video: MakeVideo, make_audio: MakeAudio, tmp_path: Path
) -> None:
    codecs = {"h264": "libx264", "vp9": "libvpx-vp9", ".mp3": "libmp3lame", ".ogg": "libopus", ".flac": "flac"}
    stem, suffix = Path(name).stem, Path(name).suffix
    if name in IMAGES:
        path = draw_image(tmp_path / name)
    elif stem == "tone":
        path = make_audio(name, seconds=0.3, codec=codecs.get(suffix, "pcm_s16le"))
    else:
        audio = {".webm": "libopus", ".avi": "libmp3lame", ".ts": "mp2"}.get(suffix, "aac")
        path = make_video(name, num_frames=8, codec=codecs.get(stem, stem), audio=audio)
    whole, media, source = path.read_bytes(), load_processor(image_size=32), random.Random(name)
    for number in range(24):
        damaged = bytearray(whole)
        # Headers hold most of what can mislead a parser.
        end = 300 if number % 2 else len(damaged)
        for _ in range(1 + number // 3):
            damaged[source.randrange(min(end, len(damaged)))] ^= 1 << source.randrange(8)
        path.write_bytes(damaged[: source.randrange(1, len(damaged))] if number % 8 == 7 else damaged)
        read_everything(path, media)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run as a user who has no rights here, where tests run as one who has all."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_cannot_be_reached_says_why(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "x.mp4").write_bytes(b"x")
    secret.chmod(0)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    expected = {
        tmp_path / "circle": "links in the path lead in a circle",
        tmp_path / "gone": "a link to a file that is not there",
        tmp_path / ("x" * 300): "the name is too long",
        "a" * 100_000: "the name is too long",
        tmp_path / "a\0b": "it cannot be the name of one",
        tmp_path / "\udcff\ud800": "it cannot be the name of one",
        Path(__file__) / "x.mp4": "a part of the path is not a folder",
    }
    for path, reason in expected.items():
        with pytest.raises(MediaError, match=reason) as caught:
            check_media_file(path)
        assert len(str(caught.value)) < 700
    with as_nobody(), pytest.raises(MediaError, match="no permission to enter its folder"):
        check_media_file(secret / "x.mp4")
    secret.chmod(0o700)


def test_reasons_do_not_send_people_to_the_rights_of_a_file() -> None:
    with pytest.raises(MediaError) as caught, translate_errors("a.mp4", "it is damaged"):
        raise av.error.PermissionError(1, "Operation not permitted")
    assert "permitted" not in str(caught.value)
    assert caught.value.hint
    with pytest.raises(MediaError, match="claims a size that it does not have"), translate_errors("a.mp4", "damaged"):
        raise av.error.MemoryError(12, "Cannot allocate memory")


def test_a_parser_of_pillow_that_stumbles_leaves_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"\x01\x02\x03" * 100)

    def stumble_with(error: Exception) -> None:
        def stumble(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(Image, "open", stumble)

    for error in (ZeroDivisionError(), zlib.error("bad"), OSError("cannot identify"), KeyError(3), struct.error("x")):
        stumble_with(error)
        assert describe_content(str(path)) == ""
    stumble_with(MemoryError())
    with pytest.raises(MemoryError):
        describe_content(str(path))
    stumble_with(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(MediaError, match="Input/output error"):
        describe_content(str(path))


def test_the_beginning_of_a_recording_alone_has_no_frames(make_video: MakeVideo) -> None:
    path = make_video(container_options={"movflags": "frag_keyframe+empty_moov"})
    content = path.read_bytes()
    # What players of streams fetch first: everything before the first fragment.
    path.write_bytes(content[: content.index(b"moof") - 4])
    _, [error] = ClipReader(load_processor(image_size=32))(path)
    assert isinstance(error, MediaError)
    assert error.reason.startswith("the video has no frames")
    assert "permitted" not in str(error)
