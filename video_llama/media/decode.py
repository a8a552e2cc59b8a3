"""From a file to plain arrays: the frames and the audio of a clip, whole or window by window.

This is the first half of the way from a file to tensors. It needs no torch and can be pickled, so it runs in any
process; `MediaProcessor` and `ClipReader` finish what it gives. Which library decodes the frames is a name in the
registry `VIDEO_READERS`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from video_llama.errors import MediaError, NoAudioTrackError, VideoLlamaError
from video_llama.media.audio import RawSegments, read_segments, read_window
from video_llama.media.audio_track import OpenedFile
from video_llama.media.containers import check_media_file, describe_content, media_kind
from video_llama.media.image import load_image, read_image, resize_image
from video_llama.media.pixels import FramesInMemory
from video_llama.media.reasons import describe_error
from video_llama.media.sampling import SegmentSettings, frame_window, sample_uniform_indices
from video_llama.media.sources import LocalFile, describe_source, is_file, open_source
from video_llama.registry import VIDEO_READERS
from video_llama.utils.extras import EXTRAS, require_extra

__all__ = [
    "DEFAULT_VIDEO_READER",
    "ClipDecoder",
    "DecodedClip",
    "DecodedVideo",
    "OpenVideoReader",
    "VideoReader",
    "check_video_reader",
    "decode_video",
    "num_decoder_threads",
    "num_windows",
    "sample_window",
    "why_no_audio",
]

DEFAULT_VIDEO_READER = "pyav"
"""Scales exactly as the decoder that the published models saw; today's versions of decord do not."""

WINDOWS_AT_ONCE = 8
"""How many windows are read for one opening of a long video; the next ones may be another process's."""

# Beyond this the decoders hold many frames and gain little.
_MAX_DECODER_THREADS = 8

SampleFrames = Callable[[int, int], list[int]]
"""(frames there are, frames wanted) -> ascending indices."""


class VideoReader(Protocol):
    """An open video that gives frames by index, upright, in one fixed size.

    A reader may have more attributes: `times_seconds`, when each frame appears, counted from the first one, and
    `duration_seconds`, when the last one goes, where these do not follow from `fps`; and those of an `OpenedFile`: then
    the audio is read from there.

    Attributes:
        num_frames: how many frames the video has.
        fps: average frames per second.
    """

    num_frames: int
    fps: float

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Return frames by ascending index (repeats allowed): (len(indices), height, width, 3), uint8, RGB.

        Raises:
            MediaError: a frame cannot be decoded.
        """
        ...


OpenVideoReader = Callable[[str | os.PathLike[str], int, int], AbstractContextManager[VideoReader]]
"""What the registry holds: `open(path, height, width)`, a context manager that raises `MediaError`."""


@dataclass(frozen=True)
class DecodedVideo:
    """Sampled frames of one video.

    Attributes:
        frames: (frames, height, width, 3), uint8, RGB.
        indices: which frames of the file these are.
        times_seconds: from the first frame of the file on, as the file states them.
        fps: average frames per second of the file.
        num_source_frames: how many frames the file has.
    """

    frames: NDArray[np.uint8]
    indices: list[int]
    times_seconds: list[float]
    fps: float
    num_source_frames: int


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """A clip, or one window of a long one, as decoded.

    Attributes:
        source: the file.
        frames: (frames, height, width, 3), uint8, RGB; None for an audio file.
        kind: what the frames are.
        times_seconds, indices: of the frames, from the window's start and from the file's; empty for an image.
        audio: what was decoded, why it cannot be decoded, or None where there is nothing to decode.
        start_seconds, end_seconds: which part of the file this is; None for a whole one.
    """

    source: str
    frames: NDArray[np.uint8] | None
    kind: Literal["video", "image"]
    times_seconds: list[float]
    indices: list[int]
    audio: RawSegments | MediaError | None
    start_seconds: float | None = None
    end_seconds: float | None = None


Decoded = tuple[int, list[DecodedClip | VideoLlamaError]]
"""How many windows a clip has, and those that were read; one that cannot be read is its error."""


@dataclass(frozen=True)
class ClipDecoder:
    """Decodes clips as one model wants them.

    Attributes:
        image_size: height and width of frames.
        num_frames: to sample of a video or of each window.
        video_reader: name in `VIDEO_READERS`.
        segments: what is taken of audio.
        audio: read the audio of videos, and accept audio files.
        window_seconds: cut videos into windows of this length; the frames' times begin at 0 in each.
        sample: which frames are taken.
        allow_urls: download sources that are addresses of the web.
    """

    image_size: int
    num_frames: int
    video_reader: str
    segments: SegmentSettings
    audio: bool
    window_seconds: float | None = None
    sample: SampleFrames = sample_uniform_indices
    allow_urls: bool = False

    def __call__(self, source: Any, first: int = 0) -> Decoded:
        """Decode a file of any kind, or of a long video `WINDOWS_AT_ONCE` windows.

        Args:
            source: as for `open_source`.
            first: number of the first window to read.
        """
        try:
            with open_source(source, self.allow_urls) as file:
                total, clips = self._decode(file.path, first)
                return total, [_named(clip, file) for clip in clips]
        except VideoLlamaError as error:
            return 1, [error]
        except (OSError, MemoryError) as error:
            reason = f"cannot be read: {describe_error(error)}"
            return 1, [MediaError(describe_source(source), reason)]

    def video(self, source: Any, start_seconds: float | None = None, end_seconds: float | None = None) -> DecodedClip:
        """Decode the frames of a video and, if `audio` is true, its audio; the file is opened once.

        Args:
            source: as for `open_source`, or frames in memory: see `FramesInMemory`.
            start_seconds, end_seconds: this part of a file only, as if it had been cut out.

        Raises:
            MediaError: the file is no video, is damaged, or ends before the part; an array that is no video.
        """
        if not is_file(source):
            return self._frames_in_memory(source)
        with open_source(source, self.allow_urls) as file:
            return cast(DecodedClip, _named(self._video(file.path, start_seconds, end_seconds), file))

    def length(self, source: Any) -> tuple[int, float]:
        """Return how many frames a video file has, and how many a second.

        Raises:
            MediaError: the file is no video, or is damaged.
        """
        open_reader = _find_reader(self.video_reader)
        size = self.image_size
        with open_source(source, self.allow_urls) as file, open_reader(file.path, size, size) as video:
            return video.num_frames, video.fps

    def _video(self, path: str, start: float | None = None, end: float | None = None) -> DecodedClip:
        open_reader = _find_reader(self.video_reader)
        with open_reader(path, self.image_size, self.image_size) as video:
            return self._window(video, path, start, end)

    def _frames_in_memory(self, source: Any) -> DecodedClip:
        """Sample frames in memory; it is not known when they appear."""
        frames = FramesInMemory(source)
        indices = self.sample(len(frames), self.num_frames)
        resized = []
        for image in frames.take(indices):
            resized.append(resize_image(read_image(image, self.allow_urls)[1], self.image_size))
        silent = NoAudioTrackError("array", "no sound track")
        return DecodedClip("array", np.stack(resized), "video", [], indices, silent)

    def _decode(self, path: str, first: int) -> Decoded:
        if "still image" in describe_content(check_media_file(path)):
            frames = resize_image(load_image(path), self.image_size)[np.newaxis]
            return 1, [DecodedClip(path, frames, "image", [], [], None)]
        try:
            if self.window_seconds is None:
                return 1, [self._video(path)]
            return self._decode_windows(path, first, self.window_seconds)
        except MediaError:
            # Finding out the kind costs time, so it is asked only where no frames came.
            if media_kind(path) != "audio":
                raise
        if not self.audio:
            raise MediaError(path, "sound only, no video", "the model does not listen")
        return 1, [DecodedClip(path, None, "video", [], [], read_segments(path, self.segments))]

    def _decode_windows(self, path: str, first: int, seconds: float) -> Decoded:
        open_reader = _find_reader(self.video_reader)
        clips: list[DecodedClip | VideoLlamaError] = []
        with open_reader(path, self.image_size, self.image_size) as video:
            duration = getattr(video, "duration_seconds", video.num_frames / video.fps)
            total = num_windows(duration, seconds)
            for number in range(first, min(first + WINDOWS_AT_ONCE, total)):
                # The last window reaches to the end, whatever the header says of it.
                start, end = number * seconds, (number + 1) * seconds
                is_last = number + 1 == total
                try:
                    clip = self._window(video, path, start, None if is_last else end)
                except VideoLlamaError as error:
                    # Damage in one place leaves the rest.
                    clips.append(error)
                else:
                    clips.append(replace(clip, start_seconds=start, end_seconds=duration if is_last else end))
        return total, clips

    def _window(
        self, video: VideoReader, path: str | os.PathLike[str], start: float | None = None, end: float | None = None
    ) -> DecodedClip:
        if end is not None:
            start = start or 0.0
        decoded = sample_window(video, path, self.num_frames, self.sample, start, end)
        times = decoded.times_seconds
        if start is not None:
            times = [max(0.0, time - start) for time in times]
        audio: RawSegments | MediaError | None = None
        if self.audio:
            opened: OpenedFile | None = None
            if isinstance(video, OpenedFile):
                opened = video
            try:
                if start is None:
                    audio = read_segments(path, self.segments, opened)
                else:
                    audio = read_window(path, start, end, self.segments, opened)
            except MediaError as error:
                # A video whose audio is damaged can still be watched.
                audio = error
        return DecodedClip(os.fspath(path), decoded.frames, "video", times, decoded.indices, audio)


def decode_video(
    path: str | os.PathLike[str],
    num_frames: int,
    height: int,
    width: int,
    *,
    reader: str = DEFAULT_VIDEO_READER,
    sample: SampleFrames = sample_uniform_indices,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> DecodedVideo:
    """Decode some frames of a video, squashed to one size while decoding.

    Args:
        path: a video file in any format FFmpeg reads.
        num_frames: frames to take; uniform sampling takes fewer from a video that has fewer.
        height, width: size of the frames; the aspect ratio is not kept, as in training.
        reader: name in `VIDEO_READERS`.
        sample: which frames are taken.
        start_seconds, end_seconds: sample this part of the video only.

    Raises:
        MediaError: the file is no video, is damaged, or ends before `start_seconds`.
        ConfigError: unknown `reader`, or its package is not installed.
    """
    open_reader = _find_reader(reader)
    with open_reader(path, height, width) as video:
        return sample_window(video, path, num_frames, sample, start_seconds, end_seconds)


def sample_window(
    video: VideoReader,
    path: str | os.PathLike[str],
    num_frames: int,
    sample: SampleFrames = sample_uniform_indices,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> DecodedVideo:
    """Decode some frames of an open video, or of a part of it; arguments as in `decode_video`.

    Raises:
        MediaError: the video is damaged, or ends before `start_seconds`.
    """
    shown_at: list[float] | None = getattr(video, "times_seconds", None)
    if shown_at is None:
        shown_at = [index / video.fps for index in range(video.num_frames)]
    first, stop = 0, video.num_frames
    if start_seconds is not None or end_seconds is not None:
        duration = getattr(video, "duration_seconds", video.num_frames / video.fps)
        try:
            first, stop = frame_window(shown_at, duration, start_seconds, end_seconds)
        except ValueError as error:
            raise MediaError(path, str(error)) from error
    indices, times = [], []
    for index in sample(stop - first, num_frames):
        indices.append(first + index)
        times.append(shown_at[first + index])
    return DecodedVideo(video.read(indices), indices, times, video.fps, video.num_frames)


@cache
def _find_reader(name: str) -> OpenVideoReader:
    """Look a reader up once: its module is imported then.

    Raises:
        ConfigError: there is no such reader.
    """
    reader: OpenVideoReader = VIDEO_READERS.get(name)
    return reader


def check_video_reader(name: str) -> None:
    """Check that frames can be decoded with this reader, before anything slow is begun.

    Raises:
        ConfigError: there is no such reader, or its package is not installed.
    """
    VIDEO_READERS.get(name)
    if name in EXTRAS:
        require_extra(name, f"the video reader {name!r}")


def num_decoder_threads() -> int:
    """Return the threads for one decoder: as many as torch may use, which is one inside a data loader's worker.

    One, too, where torch is not even loaded: such a process does nothing but decode, and there are several.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return 1
    return int(min(torch.get_num_threads(), _MAX_DECODER_THREADS))


def why_no_audio(error: MediaError) -> str:
    """Return one phrase for people."""
    if isinstance(error, NoAudioTrackError):
        return error.reason
    return f"sound track cannot be decoded: {error.reason}"


def num_windows(duration_seconds: float, window_seconds: float) -> int:
    """Return how many windows a video is cut into; a rest shorter than half a window belongs to the last one."""
    return max(1, int(duration_seconds / window_seconds + 0.5))


def _named(clip: DecodedClip | VideoLlamaError, file: LocalFile) -> DecodedClip | VideoLlamaError:
    """Name the source of what was read: a member of a shard, and what was in memory, was copied to another file."""
    if isinstance(clip, MediaError):
        return type(clip)(file.name, clip.reason, clip.hint)
    if isinstance(clip, VideoLlamaError) or file.path == file.name:
        return clip
    audio = clip.audio
    if isinstance(audio, MediaError):
        audio = type(audio)(file.name, audio.reason, audio.hint)
    elif audio is not None:
        audio = audio.of(file.name)
    return replace(clip, source=file.name, audio=audio)
