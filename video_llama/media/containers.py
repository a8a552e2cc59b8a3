"""Open media containers with FFmpeg (through PyAV); whatever is wrong with one becomes a `MediaError`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream

from video_llama.errors import MediaError, NoAudioTrackError
from video_llama.media.probe import check_media_file, describe_content, find_truncation

__all__ = [
    "demux_packets",
    "limit_frames",
    "max_frame_pixels",
    "open_container",
    "select_stream",
    "translate_errors",
]

# Packets are flagged as damaged wherever a broadcast recording starts or ends, and where a WAV file says to
# be a few bytes longer than it is (one that is really cut short never gets here). Elsewhere the flag means
# damage.
_FORMATS_FLAGGED_WITHOUT_DAMAGE = {"mpeg", "mpegts", "wav"}

# Only the file itself may be read, never what it names.
_OPEN_OPTIONS = {"protocol_whitelist": "file"}
# Metadata in some other encoding is no reason to fail; from PyAV 19 on it never is, and this cannot be said.
_OPEN_ARGUMENTS: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(InputContainer, "metadata_errors") else {}
# Before version 17, PyAV writes beyond its memory if decoders get options while a file is being opened whose header
# does not name all streams (MPEG program and transport streams do not, damaged files need not).
_DECODERS_TAKE_OPTIONS = int(av.__version__.split(".")[0]) >= 17
_OPEN_TIMEOUT_SECONDS = 60.0

# Four times 8K; a damaged header can claim sizes that would fill the memory.
_max_frame_pixels: ContextVar[int] = ContextVar("max_frame_pixels", default=2**27)


def max_frame_pixels() -> int:
    """Largest frame, width times height, that is decoded."""
    return _max_frame_pixels.get()


@contextmanager
def limit_frames(pixels: int) -> Iterator[None]:
    """Decode no larger frames within this block and thread, wherever in a video they come."""
    before = _max_frame_pixels.set(pixels)
    try:
        yield
    finally:
        _max_frame_pixels.reset(before)


@contextmanager
def open_container(path: str | os.PathLike[str]) -> Iterator[InputContainer]:
    """Open a media file for demuxing and close it again.

    Raises:
        MediaError: no such file, empty, truncated, or no video or sound at all (the message says what it
            seems to be).
    """
    name = check_media_file(path)
    content = describe_content(name)
    if content:
        hint = "open it as an image" if "still image" in content else ""
        raise MediaError(path, f"neither video nor sound but {content}", hint)
    truncation = find_truncation(name)
    if truncation:
        raise MediaError(path, truncation, "copy or download it again")
    with translate_errors(path, "not a media file, or damaged beyond reading"):
        # Opening decodes a frame of each stream.
        of_decoders = {"max_pixels": str(max_frame_pixels())} if _DECODERS_TAKE_OPTIONS else {}
        container = av.open(
            name,
            options=of_decoders,
            container_options=_OPEN_OPTIONS,
            timeout=(_OPEN_TIMEOUT_SECONDS, None),
            **_OPEN_ARGUMENTS,
        )
    with container:
        yield container


@contextmanager
def translate_errors(path: str | os.PathLike[str], reason: str) -> Iterator[None]:
    """Turn FFmpeg's errors into `MediaError(path, reason)` with FFmpeg's own words added."""
    try:
        yield
    # FFmpeg's messages about damaged files can quote bytes of the file, which PyAV then fails to decode.
    except (av.FFmpegError, UnicodeDecodeError) as error:
        detail = getattr(error, "strerror", None) or "unreadable bytes"
        raise MediaError(path, f"{reason}: {detail}") from error


def select_stream(container: InputContainer, path: str | os.PathLike[str], kind: Literal["video", "audio"]) -> Stream:
    """The stream a player would choose: the default one, then the largest picture or the most channels.

    Raises:
        NoAudioTrackError: a sound was asked for and the file has none.
        MediaError: a video was asked for and the file has none (a cover picture is not a video).
    """
    stream = container.streams.best(kind)
    if stream is not None and not stream.disposition & Disposition.attached_pic:
        if stream.codec_context is None:
            raise MediaError(path, f"its {kind} codec is unknown", "convert it to H.264 and AAC in an .mp4 file")
        return stream
    if kind == "audio":
        raise NoAudioTrackError(path, "no sound track")
    if container.streams.audio:
        raise MediaError(path, "sound only, no video", "process it as audio")
    raise MediaError(path, "no video stream in it")


def demux_packets(container: InputContainer, stream: Stream, path: str | os.PathLike[str]) -> Iterator[Packet]:
    """The packets of a stream from the current position on; the last, empty one flushes its decoder.

    Raises:
        MediaError: the file cannot be read on, or a packet in it is damaged or cut short.
    """
    packets = container.demux(stream)
    while True:
        try:
            with translate_errors(path, f"the {stream.type} stream is damaged"):
                packet = next(packets, None)
        except IndexError:  # after all packets, PyAV stumbles over streams that appeared midway
            return
        if packet is None:
            return
        if packet.is_corrupt and container.format.name not in _FORMATS_FLAGGED_WITHOUT_DAMAGE:
            raise MediaError(path, f"the {stream.type} stream is damaged or cut short")
        yield packet
