"""Read video frames through decord (the `decord2` distribution).

Its present versions scale with FFmpeg's bicubic filter, so frames differ by one or two grey levels from
those the published models saw, by more where saturated colours are enlarged. It is offered because configs
may name it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

from video_llama.errors import MediaError
from video_llama.media.containers import check_media_file, describe_content, open_container, select_stream
from video_llama.media.decode import VideoReader, num_decoder_threads
from video_llama.media.frame_scaling import is_mirrored
from video_llama.media.pyav_reader import open_pyav
from video_llama.media.sampling import frame_seconds
from video_llama.registry import VIDEO_READERS
from video_llama.utils.extras import import_extra

__all__ = ["DecordReader", "open_decord"]

# Where decord gives other frames than it is asked for.
_FORMATS_READ_WRONGLY = {"avi", "mpeg", "mpegts"}
_ROUNDING_SECONDS = 0.001
# Among others at small widths as 48, where decord fails.
_HINT = "the video reader 'pyav' may be able to"


@VIDEO_READERS.register("decord")
@contextmanager
def open_decord(path: str | os.PathLike[str], height: int, width: int) -> Iterator[VideoReader]:
    """Open a video with decord, or an animation with Pillow; an `OpenVideoReader`.

    Raises:
        MediaError: the file is no video, is damaged, or is an AVI file or MPEG stream, which decord
            reads wrongly.
        ConfigError: decord is not installed.
    """
    if "animation" in describe_content(check_media_file(path)):
        with open_pyav(path, height, width) as animation:
            yield animation
        return
    # Says what is wrong with a file; decord prints it to stderr at best.
    with open_container(path) as container:
        stream = cast(VideoStream, select_stream(container, path, "video"))
        if container.format.name in _FORMATS_READ_WRONGLY:
            reason = f"decord gives wrong frames of {container.format.name} files"
            raise MediaError(path, reason, "use the video reader 'pyav'")
        # Of a first frame that cannot be decoded, decord itself says what is wrong.
        with suppress(av.FFmpegError):
            frame = next(container.decode(stream), None)
            if frame is not None and is_mirrored(frame):
                raise MediaError(path, "decord does not mirror its frames", "use the video reader 'pyav'")
    yield DecordReader(path, height, width)


class DecordReader:
    """A `VideoReader`.

    Args:
        path: the video file.
        height, width: size the frames are scaled to.

    Raises:
        MediaError: decord cannot open the file or finds no frames in it.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int) -> None:
        self._path = path
        self._decord = _import_decord()
        try:
            self._video = self._decord.VideoReader(
                os.path.abspath(path), width=width, height=height, num_threads=num_decoder_threads()
            )
        # What decord raises for a file it cannot open and for a frame count of 0.
        except (self._decord.DECORDError, RuntimeError, AssertionError) as error:
            raise MediaError(path, f"decord cannot open it: {_last_line(error)}", _HINT) from error
        self.num_frames = len(self._video)
        self.fps = float(self._video.get_avg_fps())
        # When each frame appears and goes, in single precision.
        shown = self._video.get_frame_timestamp(range(self.num_frames)).astype(np.float64)
        last = float(shown[-1, 1] - shown[-1, 0])
        self.times_seconds, self.duration_seconds = frame_seconds(shown[:, 0], last, self.fps, _ROUNDING_SECONDS)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames by ascending index; see `VideoReader.read`."""
        try:
            frames: NDArray[np.uint8] = self._video.get_batch(list(indices)).asnumpy()
        except self._decord.DECORDError as error:
            raise MediaError(self._path, f"decord cannot decode it: {_last_line(error)}", _HINT) from error
        return frames


def _import_decord() -> Any:
    """decord, quiet. Imported late: it takes a second and maps every CUDA library that is installed."""
    decord = import_extra("decord", "the video reader 'decord'")
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def _last_line(error: Exception) -> str:
    """The cause in decord's message: what follows the source positions, without the stack trace."""
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return first_line.rsplit(": ", 1)[-1]
