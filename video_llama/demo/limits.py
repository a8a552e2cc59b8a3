"""What a visitor may upload and ask; checked before anything is decoded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from av import VideoStream
from PIL import Image

from video_llama.errors import MediaError, NoAudioTrackError, VideoLlamaError
from video_llama.inference.generation import GenerationOptions
from video_llama.media.containers import demux_packets, media_kind, open_container, select_stream

__all__ = ["Limits"]

_MOST_PACKETS_PER_SECOND = 1000  # of sound or frames; more is a file made to keep a server busy


@dataclass(frozen=True)
class Limits:
    """Limits of the web demo.

    Attributes:
        upload_mb: largest file, in megabytes of 10^6 bytes.
        uploads_kept: as many files of that size may be stored at one time, for all visitors together.
        seconds: longest video or sound.
        pixels: largest frame or image, width times height.
        pixels_between_keyframes: that may have to be decoded to reach one frame of a video.
        media: files in one conversation.
        question_characters: longest question.
        answer_tokens: most tokens a visitor may ask for.
        beams: widest beam search a visitor may ask for.
        temperature: highest temperature.
        frames: most frames a visitor may have sampled.
        sessions: visitors at one time; each holds features.
        idle_seconds: a session that was not used for so long is ended.
        kv_cache_gib: keys and values that all sessions together keep for their next questions, in GiB; None for half
            of what the device has free once the model is loaded.
    """

    upload_mb: float = 200
    uploads_kept: int = 20
    seconds: float = 3600
    pixels: int = 4096 * 2304
    pixels_between_keyframes: float = 3e10  # a minute's work of one core, or two
    media: int = 8
    question_characters: int = 2000
    answer_tokens: int = 1024
    beams: int = 8
    temperature: float = 2
    frames: int = 32
    sessions: int = 64
    idle_seconds: float = 1800
    kv_cache_gib: float | None = None

    @property
    def upload_bytes(self) -> int:
        """Largest file in bytes."""
        return int(self.upload_mb * 1_000_000)

    @property
    def stored_bytes(self) -> int:
        """Most bytes of uploads at one time."""
        return self.uploads_kept * self.upload_bytes

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_gib` in bytes."""
        return None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30)

    def raised(self, options: GenerationOptions, num_frames: int | None = None) -> Limits:
        """Limits that let visitors have what the owner of the server chose, were it beyond them.

        Args:
            options: how answers are drawn unless a visitor chooses otherwise.
            num_frames: frames to look at in a video; None for as many as the model was trained with.
        """
        return replace(
            self,
            answer_tokens=max(self.answer_tokens, options.max_new_tokens),
            beams=max(self.beams, options.num_beams),
            temperature=max(self.temperature, options.temperature),
            frames=max(self.frames, num_frames or 1),
        )

    def check_file(self, path: str | os.PathLike[str]) -> str:
        """The kind of a file ("video", "image" or "audio") that keeps within the limits.

        Raises:
            MediaError: it is too large, too long, or nothing that can be looked at or listened to.
        """
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        if size > self.upload_bytes:
            raise MediaError(path, f"{size / 1e6:.0f} MB is too large", f"at most {self.upload_mb:g} MB")
        kind = media_kind(path)
        if kind == "image":
            self._check_image(path)
        else:
            self._check_streams(path, kind == "video")
        return kind

    def check_question(self, text: Any) -> str:
        """The question without white space around it.

        Raises:
            VideoLlamaError: it is no text, empty or too long.
        """
        if not isinstance(text, str):
            raise VideoLlamaError("the question must be text")
        text = text.strip()
        if not text:
            raise VideoLlamaError("type a question first")
        if len(text) > self.question_characters:
            raise VideoLlamaError(
                f"the question has {len(text)} characters; at most {self.question_characters} are read"
            )
        return text

    def _check_image(self, path: str | os.PathLike[str]) -> None:
        try:
            with Image.open(os.fspath(path)) as image:  # reads the header only
                width, height = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise MediaError(path, "the image cannot be read", "save it again as PNG or JPEG") from error
        self._check_size(path, width, height)

    def _check_streams(self, path: str | os.PathLike[str], video: bool) -> None:
        if video:
            with open_container(path) as container:
                for stream in container.streams.video:
                    self._check_size(path, stream.width, stream.height)
            self._check_packets(path, "video")
        try:
            self._check_packets(path, "audio")
        except NoAudioTrackError:
            return  # whoever needs the sound says so

    def _check_packets(self, path: str | os.PathLike[str], kind: Literal["video", "audio"]) -> None:
        """Whether a stream is as short as it says: by its packets, which are cheap to read, not by its header."""
        with open_container(path) as container:
            stream = select_stream(container, path, kind)
            self._check_length(path, float(container.duration or 0) / 1_000_000)
            pixels = stream.width * stream.height if isinstance(stream, VideoStream) else 0
            start: float | None = None
            since_keyframe = 0
            for number, packet in enumerate(demux_packets(container, stream, path)):
                since_keyframe = 0 if packet.is_keyframe else since_keyframe + 1
                if since_keyframe * pixels > self.pixels_between_keyframes:
                    raise MediaError(path, "its key frames are too far apart", "convert it to H.264 in an .mp4 file")
                if packet.pts is None or packet.time_base is None:
                    continue
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                start = end if start is None else min(start, end)
                self._check_length(path, max(end - start, number / _MOST_PACKETS_PER_SECOND))

    def _check_size(self, path: str | os.PathLike[str], width: int, height: int) -> None:
        if width * height > self.pixels:
            raise MediaError(path, f"{width}x{height} pixels are too many", f"at most {self.pixels / 1e6:.1f} million")

    def _check_length(self, path: str | os.PathLike[str], seconds: float) -> None:
        if seconds > self.seconds:
            raise MediaError(
                path, f"{seconds / 60:.0f} minutes are too long", f"at most {self.seconds / 60:.0f} minutes"
            )
