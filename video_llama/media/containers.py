"""Media files before and while they are read: what a file is, its container, its streams and their packets.

The first bytes and the sizes that containers declare are checked before a decoder sees the file. Containers are
opened with FFmpeg, through PyAV. Whatever is wrong with a file becomes a `MediaError`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from video_llama.constants import Modality
from video_llama.errors import MediaError, NoAudioTrackError
from video_llama.media.reasons import describe_error, why_not_found
from video_llama.media.signatures import IMAGE_BRANDS, describe_image_boxes, describe_other
from video_llama.media.truncation import FIRST_BOXES, describe_truncation

__all__ = [
    "REPAIR",
    "check_media_file",
    "demux_packets",
    "describe_content",
    "find_truncation",
    "limit_frames",
    "max_frame_pixels",
    "media_kind",
    "open_container",
    "select_stream",
    "translate_errors",
]

_HEAD_BYTES = 1024

# What video and audio files begin with: Pillow need not be asked. One of its formats (TGA) has no signature.
_MEDIA_SIGNATURES = (
    *(b"\x1aE\xdf\xa3", b"OggS", b"fLaC", b"ID3", b"FLV\x01", b"0&\xb2u", b"RF64", b"FORM", b"\xff\xfb"),
    # Uncompressed video with a line of text as its header.
    b"YUV4MPEG2 ",
)

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
# A day.
_LONG_MICROSECONDS = str(86_400_000_000)

REPAIR = "copy or download it again; if it plays elsewhere, convert it to H.264 and AAC in an .mp4 file"

max_frame_pixels: ContextVar[int] = ContextVar("max_frame_pixels", default=2**27)
"""Largest frame, width times height, that is decoded: four times 8K. A damaged header can claim sizes that would fill
the memory."""


def check_media_file(path: str | os.PathLike[str]) -> str:
    """Absolute name of an existing, readable, non-empty regular file.

    Raises:
        MediaError: anything else. A pipe or a device would block, an address would be fetched: both are
            refused.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise MediaError(path, why_not_found(path, error)) from error
    except ValueError as error:
        raise MediaError(
            path, "no such file: it cannot be the name of one", "it holds an impossible character"
        ) from error
    if stat.S_ISDIR(status.st_mode):
        raise MediaError(path, "a folder, not a file", "give the files in it; video-llama caption takes folders")
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(path, "not a regular file")
    if not os.access(path, os.R_OK):
        raise MediaError(path, "no permission to read it")
    if status.st_size == 0:
        raise MediaError(path, "the file is empty")
    return os.path.abspath(path)


def describe_content(path: str) -> str:
    """Return what a file seems to be that no container is opened for: "a still image (PNG)", "a text file"; else "".

    An animated WebP or PNG file is "an animation (WebP)" or "(PNG)": a video that Pillow reads.
    """
    with translate_errors(path, "cannot be read"):
        return _describe_content(path)


def _describe_content(path: str) -> str:
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if head[4:8] in FIRST_BOXES and head[8:12] not in IMAGE_BRANDS:
        return ""
    if head[4:8] == b"ftyp":
        return describe_image_boxes(path, head)
    if head.startswith(_MEDIA_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] != b"WEBP"):
        return ""
    # Transport streams, of cameras too; start codes of MPEG (an ICO file begins with 00 00 01 00).
    if head[0:377:188] == b"GGG" or head[4:389:192] == b"GGG":
        return ""
    if head[:3] == b"\x00\x00\x01" and head[3:4] != b"\x00":
        return ""
    return describe_other(path, head)


def find_truncation(path: str) -> str:
    """Say how a file falls short of what it declares, or "" if it is whole or does not tell."""
    with translate_errors(path, "cannot be read"), open(path, "rb") as file:
        return describe_truncation(file, os.path.getsize(path))


def media_kind(path: str | os.PathLike[str]) -> Modality:
    """Return what a file is, by its content and not by its name.

    An audio file with a cover image is audio; an animated GIF, WebP or PNG file is a video.

    Raises:
        MediaError: no such file, or nothing that can be decoded; the message says what it seems to be.
    """
    content = describe_content(check_media_file(path))
    if "still image" in content:
        return "image"
    if "animation" in content:
        return "video"
    with open_container(path) as container:
        is_video = any(not stream.disposition & Disposition.attached_pic for stream in container.streams.video)
        return "video" if is_video or not container.streams.audio else "audio"


@contextmanager
def limit_frames(pixels: int) -> Iterator[None]:
    """Decode no larger frames within this block and thread, wherever in a video they come."""
    before = max_frame_pixels.set(pixels)
    try:
        yield
    finally:
        max_frame_pixels.reset(before)


@contextmanager
def open_container(path: str | os.PathLike[str], probe_bytes: int | None = None) -> Iterator[InputContainer]:
    """Open a media file for demuxing and close it again.

    Args:
        path: the file.
        probe_bytes: how much may be read to find out what its streams are like; None is what FFmpeg reads by default.

    Raises:
        MediaError: no such file, empty, truncated, or no video or sound at all (the message says what it
            seems to be).
    """
    name = check_media_file(path)
    content = describe_content(name)
    # Pillow reads it (`AnimationReader`); such files have no audio.
    if "animation" in content:
        raise NoAudioTrackError(path, "no sound track")
    if content:
        hint = "open it as an image" if "still image" in content else ""
        raise MediaError(path, f"{content}, not a video or audio file", hint)
    truncation = find_truncation(name)
    if truncation:
        raise MediaError(path, truncation, "copy or download it again")
    with translate_errors(path, "not a media file, or damaged beyond reading"):
        # Opening decodes a frame of each stream.
        of_decoders = {"max_pixels": str(max_frame_pixels.get())} if _DECODERS_TAKE_OPTIONS else {}
        of_demuxer = dict(_OPEN_OPTIONS)
        if probe_bytes is not None:
            of_demuxer |= {"probesize": str(probe_bytes), "analyzeduration": _LONG_MICROSECONDS}
        container = av.open(
            name,
            format=_known_format(name),
            options=of_decoders,
            container_options=of_demuxer,
            timeout=(_OPEN_TIMEOUT_SECONDS, None),
            **_OPEN_ARGUMENTS,
        )
    # Whatever is read of the file is read within this block: no error of FFmpeg leaves it.
    with translate_errors(path, "damaged, or not complete"), container:
        yield container


def _known_format(path: str) -> str | None:
    """Return what FFmpeg would not find out: of images behind each other in a file named `.jpg` it takes the first."""
    with open(path, "rb") as file:
        if file.read(3) == b"\xff\xd8\xff":
            return "mjpeg"
    return None


@contextmanager
def translate_errors(path: str | os.PathLike[str], reason: str, hint: str = REPAIR) -> Iterator[None]:
    """Turn errors of FFmpeg and of the system into `MediaError(path, reason)`, with what they mean added."""
    try:
        yield
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise MediaError(path, f"{reason}: {describe_error(error)}", hint) from error


def select_stream(container: InputContainer, path: str | os.PathLike[str], kind: Literal["video", "audio"]) -> Stream:
    """The stream a player would choose: the default one, then the largest picture or the most channels.

    Raises:
        NoAudioTrackError: a sound was asked for and the file has none.
        MediaError: a video was asked for and the file has none (a cover picture is not a video), or its frames are too
            large.
    """
    stream = container.streams.best(kind)
    if stream is not None and not stream.disposition & Disposition.attached_pic:
        if stream.codec_context is None:
            raise MediaError(path, f"its {kind} codec is unknown", "convert it to H.264 and AAC in an .mp4 file")
        # Of an image in tiles, each tile is a stream.
        if kind == "video" and stream.disposition & Disposition.dependent:
            raise MediaError(path, "a still image in parts, not a video", "convert it to PNG or JPEG")
        if isinstance(stream, VideoStream) and stream.width * stream.height > max_frame_pixels.get():
            raise MediaError(path, f"frames of {stream.width}x{stream.height} are too large")
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
