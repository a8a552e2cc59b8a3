"""Sample the frames of a video file; which library decodes them is a name in the `VIDEO_READERS` registry."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from video_llama.errors import MediaError
from video_llama.media.sampling import frame_window, sample_uniform_indices
from video_llama.registry import VIDEO_READERS
from video_llama.utils.extras import EXTRAS, require_extra

__all__ = [
    "DEFAULT_VIDEO_READER",
    "DecodedVideo",
    "OpenVideoReader",
    "VideoReader",
    "check_video_reader",
    "decode_video",
    "num_decoder_threads",
    "sample_window",
]

DEFAULT_VIDEO_READER = "pyav"
"""Scales exactly as the decoder that the published models saw; today's versions of decord do not."""

_MAX_DECODER_THREADS = 8  # beyond this the decoders hold many frames and gain little


class VideoReader(Protocol):
    """An open video that gives frames by index, upright, in one fixed size.

    Attributes:
        num_frames: how many frames the video has.
        fps: average frames per second.
    """

    num_frames: int
    fps: float

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames by ascending index (repeats allowed): (len(indices), height, width, 3), uint8, RGB.

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
        times_seconds: index divided by the average frame rate, from the start of the file.
        fps: average frames per second of the file.
        num_source_frames: how many frames the file has.
    """

    frames: NDArray[np.uint8]
    indices: list[int]
    times_seconds: list[float]
    fps: float
    num_source_frames: int


def check_video_reader(name: str) -> None:
    """Check that frames can be decoded with this reader, before anything slow is begun.

    Raises:
        ConfigError: there is no such reader, or its package is not installed.
    """
    VIDEO_READERS.get(name)
    if name in EXTRAS:
        require_extra(name, f"the video reader {name!r}")


def decode_video(
    path: str | os.PathLike[str],
    num_frames: int,
    height: int,
    width: int,
    *,
    reader: str = DEFAULT_VIDEO_READER,
    sample: Callable[[int, int], list[int]] = sample_uniform_indices,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> DecodedVideo:
    """Decode some frames of a video, squashed to one size while decoding.

    Args:
        path: a video file in any format FFmpeg reads.
        num_frames: frames to take; uniform sampling takes fewer from a video that has fewer.
        height, width: size of the frames; the aspect ratio is not kept, as in training.
        reader: name in `VIDEO_READERS`.
        sample: (frames there are, frames wanted) -> ascending indices.
        start_seconds, end_seconds: sample this part of the video only.

    Raises:
        MediaError: the file is no video, is damaged, or ends before `start_seconds`.
        ConfigError: unknown `reader`, or its package is not installed.
    """
    open_reader: OpenVideoReader = VIDEO_READERS.get(reader)
    with open_reader(path, height, width) as video:
        return sample_window(video, path, num_frames, sample, start_seconds, end_seconds)


def sample_window(
    video: VideoReader,
    path: str | os.PathLike[str],
    num_frames: int,
    sample: Callable[[int, int], list[int]] = sample_uniform_indices,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
) -> DecodedVideo:
    """Decode some frames of an open video, or of a part of it; arguments as in `decode_video`.

    Raises:
        MediaError: the video is damaged, or ends before `start_seconds`.
    """
    try:
        first, stop = frame_window(video.num_frames, video.fps, start_seconds, end_seconds)
    except ValueError as error:
        raise MediaError(path, str(error)) from error
    indices = [first + index for index in sample(stop - first, num_frames)]
    frames = video.read(indices)
    times = [index / video.fps for index in indices]
    return DecodedVideo(frames, indices, times, video.fps, video.num_frames)


def num_decoder_threads() -> int:
    """Threads for one decoder: as many as torch may use, which is one inside a data loader's worker.

    One, too, where torch is not even loaded: such a process does nothing but decode, and there are several.
    """
    torch = sys.modules.get("torch")
    return 1 if torch is None else min(torch.get_num_threads(), _MAX_DECODER_THREADS)
