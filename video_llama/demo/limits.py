"""Check what a visitor uploads and asks, before anything is decoded or computed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from av import VideoStream

from video_llama.errors import MediaError, NoAudioTrackError, VideoLlamaError
from video_llama.inference.generation import GenerationOptions
from video_llama.media.containers import (
    demux_packets,
    describe_content,
    media_kind,
    open_container,
    select_stream,
)
from video_llama.media.image import open_image

__all__ = ["Limits", "answer_options", "check_num_frames"]

# More packets for each second of audio or video are a file made to keep a server busy.
_MAX_PACKETS_PER_SECOND = 1000
# A lower temperature is greedy: dividing by it would overflow.
_MIN_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Limits:
    """Limits of the web demo; megabytes are 10^6 bytes."""

    upload_mb: float = 200
    # All uploads together may take as much room as so many of the largest size.
    uploads_kept: int = 20
    # Of a video or audio file.
    seconds: float = 3600
    # Of a frame or an image, and of all frames that may have to be decoded to reach one (a minute or two of one core).
    pixels: int = 4096 * 2304
    pixels_between_keyframes: float = 3e10
    # Files in one conversation.
    media: int = 8
    question_characters: int = 2000
    # The highest settings that a visitor may choose.
    answer_tokens: int = 1024
    beams: int = 8
    temperature: float = 2
    frames: int = 32
    # Conversations at one time, and how long one is kept unused.
    sessions: int = 64
    idle_seconds: float = 1800
    # Keys and values of all conversations together; None for half of what the device has free after loading.
    kv_cache_gib: float | None = None

    @property
    def upload_bytes(self) -> int:
        """Return the size of the largest upload in bytes."""
        return int(self.upload_mb * 1_000_000)

    @property
    def stored_bytes(self) -> int:
        """Return how many bytes of uploads may be stored at one time."""
        return self.uploads_kept * self.upload_bytes

    def raised(self, options: GenerationOptions, num_frames: int | None = None) -> Limits:
        """Return limits that allow what the owner of the server chose as defaults."""
        return replace(
            self,
            answer_tokens=max(self.answer_tokens, options.max_new_tokens),
            beams=max(self.beams, options.num_beams),
            temperature=max(self.temperature, options.temperature),
            frames=max(self.frames, num_frames or 1),
        )

    def check_file(self, path: str | os.PathLike[str]) -> Literal["video", "image", "audio"]:
        """Return the kind of a file that is within the limits.

        Raises:
            MediaError: it is too large, too long, or not a media file.
        """
        if os.path.isfile(path) and os.path.getsize(path) > self.upload_bytes:
            size = os.path.getsize(path) / 1e6
            raise MediaError(path, f"{size:.0f} MB is too large", f"at most {self.upload_mb:g} MB")
        kind = media_kind(path)
        if kind == "image" or "animation" in describe_content(os.fspath(path)):
            self._check_image(path)
            return kind
        if kind == "video":
            with open_container(path) as container:
                # A stream without a decoder has no size, and is refused below if it is the one to be shown.
                for stream in container.streams.video:
                    if stream.codec_context is None:
                        continue
                    self._check_size(path, stream.width, stream.height)
            self._check_packets(path, "video")
        try:
            self._check_packets(path, "audio")
        except NoAudioTrackError:
            # The decoder reports it where audio is needed.
            return kind
        return kind

    def check_question(self, text: Any) -> str:
        """Return the question without white space around it.

        Raises:
            VideoLlamaError: it is not text, empty or too long.
        """
        if not isinstance(text, str):
            raise VideoLlamaError("the question must be text")
        text = text.strip()
        if not text:
            raise VideoLlamaError("type a question first")
        if len(text) > self.question_characters:
            raise VideoLlamaError(f"the question has {len(text)} characters; the limit is {self.question_characters}")
        return text

    def _check_image(self, path: str | os.PathLike[str]) -> None:
        # Reads the header only.
        with open_image(path) as image:
            self._check_size(path, image.width, image.height)
            # Of an animation, the frames are counted as the packets of a video are.
            self._check_length(path, getattr(image, "n_frames", 1) / _MAX_PACKETS_PER_SECOND)

    def _check_packets(self, path: str | os.PathLike[str], kind: Literal["video", "audio"]) -> None:
        """Check the length of a stream by its packets, which are cheap to read, and not only by its header."""
        with open_container(path) as container:
            stream = select_stream(container, path, kind)
            self._check_length(path, float(container.duration or 0) / 1_000_000)
            pixels = stream.width * stream.height if isinstance(stream, VideoStream) else 0
            # Time stamps may start at any value, so the length counts from the earliest packet. The number of packets
            # is a second measure, against files of very many small packets.
            first_end = math.inf
            since_keyframe = 0
            for number, packet in enumerate(demux_packets(container, stream, path)):
                since_keyframe += 1
                if packet.is_keyframe:
                    since_keyframe = 0
                # To show one frame, all frames since the last key frame have to be decoded.
                if since_keyframe * pixels > self.pixels_between_keyframes:
                    advice = "encode it again: ffmpeg -i in.mp4 -g 48 out.mp4"
                    raise MediaError(path, "cannot be seeked quickly: too many frames between key frames", advice)
                if packet.pts is None or packet.time_base is None:
                    continue
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                first_end = min(first_end, end)
                self._check_length(path, max(end - first_end, number / _MAX_PACKETS_PER_SECOND))

    def _check_size(self, path: str | os.PathLike[str], width: int, height: int) -> None:
        if width * height > self.pixels:
            raise MediaError(path, f"{width}x{height} pixels are too many", f"at most {self.pixels / 1e6:.1f} million")

    def _check_length(self, path: str | os.PathLike[str], seconds: float) -> None:
        if seconds > self.seconds:
            limit = f"at most {self.seconds / 60:.0f} minutes"
            raise MediaError(path, f"{seconds / 60:.0f} minutes are too long", limit)


def answer_options(settings: Sequence[Any], limits: Limits, defaults: GenerationOptions) -> dict[str, Any]:
    """Return a visitor's settings as fields of `GenerationOptions`.

    Args:
        settings: temperature, top_p, num_beams and max_new_tokens; None (or "", an emptied field) for the default.
        limits: what a visitor may choose.
        defaults: the values where a setting is None.

    Raises:
        VideoLlamaError: a value is not a number, or out of range.
    """
    temperature, top_p, num_beams, max_new_tokens = settings
    chosen = {
        "temperature": _number("Temperature", temperature, 0, limits.temperature),
        "top_p": _number("Top-p", top_p, 0, 1),
        "num_beams": _number("Beams", num_beams, 1, limits.beams, is_whole=True),
        "max_new_tokens": _number("Max new tokens", max_new_tokens, 1, limits.answer_tokens, is_whole=True),
    }
    if chosen["top_p"] == 0:
        raise VideoLlamaError("Top-p must be above 0")
    if chosen["temperature"] is not None and chosen["temperature"] < _MIN_TEMPERATURE:
        chosen["temperature"] = 0.0
    return {name: getattr(defaults, name) if value is None else value for name, value in chosen.items()}


def check_num_frames(value: Any, limits: Limits) -> int | None:
    """Return how many frames to sample; None for as many as the model was trained with.

    Raises:
        VideoLlamaError: the value is not a whole number, or out of range.
    """
    return _number("Frames to look at", value, 1, limits.frames, is_whole=True)


def _number(name: str, value: Any, least: float, most: float, is_whole: bool = False) -> Any:
    """Return a number from `least` to `most`; None and an emptied field are None."""
    if value is None or value == "":
        return None
    # The comparisons leave out infinity and NaN without turning a huge int into a float.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf
    if is_whole and not (is_number and value % 1 == 0):
        raise VideoLlamaError(f"{name} must be a whole number")
    if not is_number:
        raise VideoLlamaError(f"{name} must be a number")
    if value < least:
        raise VideoLlamaError(f"{name} must be at least {least}")
    if value > most:
        raise VideoLlamaError(f"{name} must be at most {most}")
    return int(value) if is_whole else float(value)
