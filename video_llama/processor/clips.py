"""Read what is to be captioned, whole or window by window: a picklable reader that worker processes share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from video_llama.errors import MediaError, NoSoundTrackError, VideoLlamaError
from video_llama.processor.audio_windows import decode_audio_window
from video_llama.processor.files import check_media_file, describe_content
from video_llama.processor.image import resize_image
from video_llama.processor.kind import media_kind
from video_llama.processor.media import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.sampling import sample_uniform_indices
from video_llama.processor.transforms import normalize_frames
from video_llama.processor.video import OpenVideoReader, sample_window
from video_llama.registry import VIDEO_READERS

__all__ = [
    "ClipReader",
    "ClipSource",
    "OpensAsFile",
    "Window",
    "describe_source",
    "num_windows",
    "pack_windows",
    "unpack_windows",
]

WINDOWS_AT_ONCE = 8
"""How many windows are read for one opening of a long video; the next ones may be another process's."""


@runtime_checkable
class OpensAsFile(Protocol):
    """Media that become a file only while they are read, such as a member of a tar shard."""

    def open(self) -> AbstractContextManager[str]:
        """The path of a file that is there until the context ends."""
        ...


ClipSource = Any
"""A file (video, image or sound), what `OpensAsFile`, frames (frames, height, width, 3) of uint8, an image
(height, width, 3) or of PIL, a tensor as the model takes it, `VideoFrames`, `AudioSegments`, or a pair of what is seen
and what is heard."""


@dataclass(frozen=True, eq=False)
class Window:
    """A clip, or one part of a long one, as the model takes it.

    Args:
        frames: what is seen; None for a sound.
        audio: what is heard, or None.
        sound: one phrase for people: "heard", "no sound track", "not listened to", or why it cannot be decoded.
        start_seconds, end_seconds: which part of the file this is; None for a whole one.
    """

    frames: VideoFrames | torch.Tensor | None
    audio: AudioSegments | torch.Tensor | None
    sound: str
    start_seconds: float | None = None
    end_seconds: float | None = None


def num_windows(duration_seconds: float, window_seconds: float) -> int:
    """How many windows a video is cut into; a rest shorter than half a window belongs to the last one."""
    return max(1, int(duration_seconds / window_seconds + 0.5))


@dataclass(frozen=True)
class ClipReader:
    """Reads clips as one model wants them.

    Args:
        media: how files are read; frames are sampled at equal steps.
        audio: listen to videos, and accept sounds.
        num_frames: instead of the setting of `media`.
        window_seconds: cut videos into windows of this length; the frames' times begin at 0 in each, as if it had
            been cut out.

    Raises:
        ValueError: `window_seconds` is not above 0.
    """

    media: MediaProcessor
    audio: bool = True
    num_frames: int | None = None
    window_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.window_seconds is not None and self.window_seconds <= 0:
            raise ValueError(f"windows must be longer than {self.window_seconds} seconds")

    def __call__(self, source: ClipSource, first: int = 0) -> tuple[int, list[Window | VideoLlamaError]]:
        """Read a clip; of a long one `WINDOWS_AT_ONCE` windows.

        Args:
            source: what to read.
            first: number of the first window to read.

        Returns:
            how many windows the clip has, and those that were read; one that cannot be read is its error.
        """
        try:
            with _as_path(source) as path:
                return self._read_file(path, first) if path is not None else (1, [self._read_memory(source)])
        except MediaError as error:  # a member of a shard has another name than the file it was copied to
            is_file = isinstance(source, (str, os.PathLike, OpensAsFile))
            return 1, [MediaError(describe_source(source), error.reason, error.hint) if is_file else error]
        except VideoLlamaError as error:
            return 1, [error]
        except (OSError, MemoryError) as error:
            return 1, [MediaError(describe_source(source), f"cannot be read: {str(error) or type(error).__name__}")]

    def _read_file(self, path: str, first: int) -> tuple[int, list[Window | VideoLlamaError]]:
        if "still image" in describe_content(check_media_file(path)):
            return 1, [Window(self.media.process_image(path), None, "an image has no sound")]
        try:
            if self.window_seconds is not None:
                return self._read_windows(path, first, self.window_seconds)
            frames, _ = self.media.process_video(path, num_frames=self.num_frames, audio=False)
        except MediaError:
            if media_kind(path) != "audio":  # a question that costs time, so only where no frames came
                raise
            if not self.audio:
                raise MediaError(path, "sound only, no video", "the model does not listen") from None
            return 1, [Window(None, self.media.process_audio(path), "heard")]
        return 1, [Window(frames, *self._listen(path))]

    def _read_windows(self, path: str, first: int, seconds: float) -> tuple[int, list[Window | VideoLlamaError]]:
        size = self.media.image_size
        open_reader: OpenVideoReader = VIDEO_READERS.get(self.media.video_reader)
        windows: list[Window | VideoLlamaError] = []
        with open_reader(path, size, size) as video:
            duration = video.num_frames / video.fps
            total = num_windows(duration, seconds)
            for number in range(first, min(first + WINDOWS_AT_ONCE, total)):
                start, end = number * seconds, duration if number + 1 == total else (number + 1) * seconds
                try:
                    windows.append(self._read_window(video, path, start, end, is_last=number + 1 == total))
                except VideoLlamaError as error:  # damage in one place leaves the rest
                    windows.append(error)
        return total, windows

    def _read_window(self, video: Any, path: str, start: float, end: float, is_last: bool) -> Window:
        num_frames = self.media.num_frames if self.num_frames is None else self.num_frames
        decoded = sample_window(video, path, num_frames, sample_uniform_indices, start, None if is_last else end)
        pixels = normalize_frames(decoded.frames, self.media.mean, self.media.std)
        times = [max(0.0, time - start) for time in decoded.times_seconds]
        frames = VideoFrames(pixels, "video", times, decoded.indices, path, decoded.frames)
        return Window(frames, *self._listen(path, start, None if is_last else end), start, end)

    def _listen(
        self, path: str, start: float | None = None, end: float | None = None
    ) -> tuple[AudioSegments | None, str]:
        if not self.audio:
            return None, "not listened to"
        try:
            if start is None:
                return self.media.process_audio(path), "heard"
            waveform = decode_audio_window(path, start, end, self.media.log_mel.sample_rate_hz)
            segments = self.media.process_audio((waveform.samples, waveform.sample_rate_hz))
            return replace(segments, source=path), "heard"
        except NoSoundTrackError as error:
            return None, error.reason
        except MediaError as error:  # a video whose sound is damaged can still be watched
            return None, f"sound track cannot be decoded: {error.reason}"

    def _read_memory(self, source: ClipSource) -> Window:
        seen, heard = source if isinstance(source, tuple) else (source, None)
        if isinstance(seen, AudioSegments) or (isinstance(seen, torch.Tensor) and seen.shape[-3] == 1):
            seen, heard = None, seen
        if isinstance(seen, np.ndarray) and seen.ndim == 4:
            seen = self._process_frames(seen)
        elif isinstance(seen, (np.ndarray, Image.Image)):
            seen = self.media.process_image(seen)
        if isinstance(heard, tuple):
            heard = self.media.process_audio(heard)
        if heard is not None and not self.audio:
            heard = None
            if seen is None:
                raise MediaError("sound", "sound only, no video", "the model does not listen")
        return Window(seen, heard, "no sound" if heard is None else "heard")

    def _process_frames(self, frames: NDArray[np.uint8]) -> VideoFrames:
        """Frames (frames, height, width, 3) in memory: sampled at equal steps, squashed; nobody knows their times."""
        if frames.dtype != np.uint8 or frames.shape[-1] != 3 or not frames.size:
            reason = f"no video has shape {frames.shape} and type {frames.dtype}"
            raise MediaError("array", reason, "give (frames, height, width, 3) of uint8")
        num_frames = self.media.num_frames if self.num_frames is None else self.num_frames
        indices = sample_uniform_indices(len(frames), num_frames)
        resized = np.stack([resize_image(Image.fromarray(frames[index]), self.media.image_size) for index in indices])
        pixels = normalize_frames(resized, self.media.mean, self.media.std)
        return VideoFrames(pixels, "video", [], indices, "array", resized)


def describe_source(source: ClipSource) -> str:
    """A file's name, or one word for what is in memory."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(source) if isinstance(source, OpensAsFile) else "clip"


def _as_path(source: ClipSource) -> AbstractContextManager[str | None]:
    """The file that is to be read; None for media in memory."""
    if isinstance(source, (str, os.PathLike)):
        return nullcontext(os.fspath(source))
    if isinstance(source, OpensAsFile) and not isinstance(source, Image.Image):
        return source.open()
    return nullcontext(None)


def pack_windows(windows: Sequence[Window | VideoLlamaError]) -> list[Window | VideoLlamaError]:
    """Without the float copies of the frames, which are four times as large as the frames."""
    return [
        replace(window, frames=replace(window.frames, pixel_values=torch.empty(0)))
        if isinstance(window, Window) and isinstance(window.frames, VideoFrames)
        else window
        for window in windows
    ]


def unpack_windows(
    windows: Sequence[Window | VideoLlamaError], media: MediaProcessor
) -> list[Window | VideoLlamaError]:
    """What `pack_windows` left out, made again, bit by bit."""
    return [
        replace(
            window,
            frames=replace(window.frames, pixel_values=normalize_frames(window.frames.frames, media.mean, media.std)),
        )
        if isinstance(window, Window) and isinstance(window.frames, VideoFrames)
        else window
        for window in windows
    ]
