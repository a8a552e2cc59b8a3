"""Decode a clip, whole or window by window, into plain arrays. Nothing here needs torch.

That keeps the processes that decode ahead small: importing torch would cost each of them ten times as much memory as
the decoder does. What is left to do (`ClipReader.finish`) is quick.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from video_llama.errors import MediaError, NoAudioTrackError, VideoLlamaError
from video_llama.media.image import load_image, resize_image
from video_llama.media.kind import media_kind
from video_llama.media.probe import check_media_file, describe_content
from video_llama.media.sampling import sample_uniform_indices
from video_llama.media.segments import RawSegments, SegmentSettings, read_segments, read_window
from video_llama.media.video import DecodedVideo, OpenVideoReader, VideoReader, decode_video, sample_window
from video_llama.registry import VIDEO_READERS

__all__ = ["ClipDecoder", "DecodedWindow", "OpensAsFile", "describe_source", "num_windows"]

WINDOWS_AT_ONCE = 8
"""How many windows are read for one opening of a long video; the next ones may be another process's."""


@runtime_checkable
class OpensAsFile(Protocol):
    """Media that become a file only while they are read, such as a member of a tar shard."""

    def open(self) -> AbstractContextManager[str]:
        """The path of a file that is there until the context ends."""
        ...


@dataclass(frozen=True, eq=False)
class DecodedWindow:
    """A clip, or one part of a long one, as decoded.

    Args:
        source: the file.
        frames: (frames, height, width, 3), uint8, RGB; None for a sound.
        kind: what the frames are.
        times_seconds, indices: of the frames, from the window's start and from the file's; empty for an image.
        sound: what is heard, or one phrase on why nothing is.
        start_seconds, end_seconds: which part of the file this is; None for a whole one.
    """

    source: str
    frames: NDArray[np.uint8] | None
    kind: Literal["video", "image"]
    times_seconds: list[float]
    indices: list[int]
    sound: RawSegments | str
    start_seconds: float | None = None
    end_seconds: float | None = None


_Result = tuple[int, list[DecodedWindow | VideoLlamaError]]


@dataclass(frozen=True)
class ClipDecoder:
    """Decodes clips as one model wants them.

    Args:
        image_size: height and width of frames.
        num_frames: to sample, at equal steps, of a video or of each window.
        video_reader: name in `VIDEO_READERS`.
        segments: what is taken of sounds.
        audio: listen to videos, and accept sounds.
        window_seconds: cut videos into windows of this length; the frames' times begin at 0 in each.
    """

    image_size: int
    num_frames: int
    video_reader: str
    segments: SegmentSettings
    audio: bool
    window_seconds: float | None

    def __call__(self, source: Any, first: int = 0) -> _Result:
        """Decode a file, or of a long one `WINDOWS_AT_ONCE` windows.

        Args:
            source: a path, or what `OpensAsFile`.
            first: number of the first window to read.

        Returns:
            how many windows the clip has, and those that were read; one that cannot be read is its error.
        """
        try:
            with _as_path(source) as path:
                total, windows = self._decode(path, first)
        except VideoLlamaError as error:
            total, windows = 1, [error]
        except (OSError, MemoryError) as error:
            reason = f"cannot be read: {str(error) or type(error).__name__}"
            total, windows = 1, [MediaError(describe_source(source), reason)]
        return total, [_named(window, source) for window in windows]

    def _decode(self, path: str, first: int) -> _Result:
        if "still image" in describe_content(check_media_file(path)):
            pixels = resize_image(load_image(path), self.image_size)[np.newaxis]
            return 1, [DecodedWindow(path, pixels, "image", [], [], "an image has no sound")]
        try:
            if self.window_seconds is not None:
                return self._decode_windows(path, first, self.window_seconds)
            size = self.image_size
            video = decode_video(path, self.num_frames, size, size, reader=self.video_reader)
        except MediaError:
            if media_kind(path) != "audio":  # a question that costs time, so only where no frames came
                raise
            if not self.audio:
                raise MediaError(path, "sound only, no video", "the model does not listen") from None
            return 1, [DecodedWindow(path, None, "video", [], [], read_segments(path, self.segments))]
        return 1, [self._window(path, video)]

    def _decode_windows(self, path: str, first: int, seconds: float) -> _Result:
        open_reader: OpenVideoReader = VIDEO_READERS.get(self.video_reader)
        windows: list[DecodedWindow | VideoLlamaError] = []
        with open_reader(path, self.image_size, self.image_size) as video:
            duration = video.num_frames / video.fps
            total = num_windows(duration, seconds)
            for number in range(first, min(first + WINDOWS_AT_ONCE, total)):
                start, end = number * seconds, duration if number + 1 == total else (number + 1) * seconds
                try:
                    windows.append(self._decode_window(video, path, start, end, is_last=number + 1 == total))
                except VideoLlamaError as error:  # damage in one place leaves the rest
                    windows.append(error)
        return total, windows

    def _decode_window(self, video: VideoReader, path: str, start: float, end: float, is_last: bool) -> DecodedWindow:
        decoded = sample_window(video, path, self.num_frames, sample_uniform_indices, start, None if is_last else end)
        window = self._window(path, decoded, start, None if is_last else end)
        return replace(window, start_seconds=start, end_seconds=end)

    def _window(
        self, path: str, video: DecodedVideo, start: float | None = None, end: float | None = None
    ) -> DecodedWindow:
        times = [max(0.0, time - (start or 0.0)) for time in video.times_seconds]
        return DecodedWindow(path, video.frames, "video", times, video.indices, self._listen(path, start, end))

    def _listen(self, path: str, start: float | None, end: float | None) -> RawSegments | str:
        if not self.audio:
            return "not listened to"
        try:
            if start is None:
                return read_segments(path, self.segments)
            return read_window(path, start, end, self.segments)
        except MediaError as error:  # a video whose sound is damaged can still be watched
            return why_no_audio(error)


def why_no_audio(error: MediaError) -> str:
    """One phrase for people."""
    is_silent = isinstance(error, NoAudioTrackError)
    return error.reason if is_silent else f"sound track cannot be decoded: {error.reason}"


def num_windows(duration_seconds: float, window_seconds: float) -> int:
    """How many windows a video is cut into; a rest shorter than half a window belongs to the last one."""
    return max(1, int(duration_seconds / window_seconds + 0.5))


def describe_source(source: Any) -> str:
    """A file's name, or one word for what is in memory."""
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(source) if isinstance(source, OpensAsFile) else "clip"


def _as_path(source: Any) -> AbstractContextManager[str]:
    return nullcontext(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else source.open()


def _named(window: DecodedWindow | VideoLlamaError, source: Any) -> DecodedWindow | VideoLlamaError:
    """A member of a shard has another name than the file it was copied to."""
    if not isinstance(window, MediaError):
        return window
    return MediaError(describe_source(source), window.reason, window.hint)
