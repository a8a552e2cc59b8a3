"""Read video frames through PyAV: frame-exact, and scaled as in the reference implementation.

The reference decodes with decord 0.6.0, which scales inside FFmpeg's filter graph with the bilinear filter
that was FFmpeg's default then. The graph built here gives the same pixels, bit by bit.
"""

from __future__ import annotations

import bisect
import os
import queue
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from fractions import Fraction
from typing import Any, cast

import numpy as np
from av import FFmpegError, VideoFrame
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image, ImageOps

from video_llama.errors import MediaError
from video_llama.media.containers import (
    REPAIR,
    check_media_file,
    demux_packets,
    describe_content,
    max_frame_pixels,
    open_container,
    select_stream,
    translate_errors,
)
from video_llama.media.decode import num_decoder_threads
from video_llama.media.frame_index import FrameIndex, index_frames, read_mp4_index
from video_llama.media.frame_scaling import FrameScaler
from video_llama.media.image import open_image, to_rgb, translate_image_errors
from video_llama.registry import VIDEO_READERS

__all__ = ["AnimationReader", "PyAVReader", "open_pyav"]

# Codecs whose "non-reference" pictures nothing else is decoded from, so that unwanted ones need not be
# decoded. (HEVC's may still be referred to by higher temporal layers.)
_CODECS_WITH_SKIPPABLE_FRAMES = {"h264", "mpeg2video", "mpeg4"}

# A year. Damaged headers give each frame any number of seconds, which prompts would repeat.
_LONGEST_SECONDS = 366 * 86_400

# Of a frame of an animation (8K), and of all of them: each is put together whole, however small the file is.
_MAX_ANIMATION_FRAME, _MAX_ANIMATION = 2**25, 2**33

# Less than a tenth of a second's work: opening the file once more for it would gain nothing.
_MIN_PARALLEL_PIXELS = 50_000_000


@VIDEO_READERS.register("pyav")
@contextmanager
def open_pyav(path: str | os.PathLike[str], height: int, width: int) -> Iterator[PyAVReader | AnimationReader]:
    """Open a video with PyAV, or an animation with Pillow; an `OpenVideoReader`.

    Raises:
        MediaError: the file is no video or is damaged.
    """
    with ExitStack() as files:
        if "animation" in describe_content(check_media_file(path)):
            # FFmpeg scales what Pillow reads.
            files.enter_context(translate_errors(path, "the animation is damaged"))
            yield AnimationReader(path, files.enter_context(open_image(path)), height, width)
        else:
            yield PyAVReader(path, files, height, width)


class PyAVReader:
    """A `VideoReader`. Frames behind different keyframes are decoded at the same time, if that is worth it.

    Args:
        path: the file.
        files: what is opened stays open until this is closed.
        height, width: size the frames are scaled to.

    Attributes:
        container, start_seconds, clock_jumps: as of an `OpenedFile`, whose audio is read, too.

    Raises:
        MediaError: no video stream, no frames, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str], files: ExitStack, height: int, width: int) -> None:
        self._path = path
        self._files = files
        self._size = height, width
        self.container = container = files.enter_context(open_container(path))
        self._stream = cast(VideoStream, select_stream(container, path, "video"))
        # From the tables of the file, so that a long one is not read, or else from all its packets.
        index = read_mp4_index(path, container, self._stream)
        if index is None:
            index = index_frames(demux_packets(container, self._stream, path), container.format)
        # Not `pix_fmt`, which crashes in PyAV 17 where it is unknown.
        if getattr(self._stream.codec_context.format, "name", "") == "pal8":
            # The container may state the colours once, at its start.
            index = index.counted()
        self._index = index
        if not index.num_frames:
            raise MediaError(path, "the video has no frames")
        self._num_threads = num_decoder_threads()
        self._decoder = _Decoder(path, files, container, index, self._size, self._num_threads)
        # For decoding at several places at once, with one thread each.
        self._decoders: list[_Decoder] = []
        self.num_frames = index.num_frames
        self.clock_jumps = index.jumps
        self._take_times(index)

    def _take_times(self, index: FrameIndex) -> None:
        """Set when frames are shown, and how many a second."""
        stream = self._stream
        rate = stream.average_rate or stream.guessed_rate
        if index.shown_at is None:
            # The codec's own header may state it, where FFmpeg takes 25 a second for the average.
            rate = stream.guessed_rate or stream.average_rate
        self.fps = float(rate or 1)
        last = (self.num_frames - 1) / self.fps
        self.start_seconds: float | None
        self.start_seconds, self.times_seconds, self.duration_seconds = index.seconds(stream, self.fps)
        if index.times is None and self.times_seconds[-1] != last and stream.codec_context.has_b_frames:
            index = index.delayed(min(self._decoder.count_delay(), self.num_frames - 1))
            _, self.times_seconds, self.duration_seconds = index.seconds(stream, self.fps)
        if self.duration_seconds > _LONGEST_SECONDS:
            days = self.duration_seconds / 86_400
            raise MediaError(self._path, f"{self.num_frames} frames in {days:.0f} days: its times are damaged", REPAIR)
        # A header may speak of 30 frames a second where browsers recorded as many as they found time for.
        if self.times_seconds[-1] != last:
            self.fps = self.num_frames / self.duration_seconds

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames by ascending index; see `VideoReader.read`."""
        groups = self._index.group_by_keyframe(indices)
        num_decoders = min(self._num_threads, len(groups))
        num_decoded = 0
        for start, wanted in groups.items():
            num_decoded += wanted[-1] - start + 1
        found: dict[int, NDArray[np.uint8]] = {}
        if num_decoders < 2 or num_decoded * self._stream.width * self._stream.height < _MIN_PARALLEL_PIXELS:
            for start, wanted in groups.items():
                found |= self._decoder.read(start, wanted)
        else:
            for part in self._read_at_once(groups, num_decoders):
                found |= part
        return np.stack(list(map(found.__getitem__, indices)))

    def _read_at_once(self, groups: dict[int, list[int]], num_decoders: int) -> list[dict[int, NDArray[np.uint8]]]:
        """What is behind each keyframe; a decoder that is done with one takes the next that nobody has."""
        while len(self._decoders) < num_decoders:
            container = self._files.enter_context(open_container(self._path))
            self._decoders.append(_Decoder(self._path, self._files, container, self._index, self._size, num_threads=1))
        idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        for decoder in self._decoders:
            idle.put(decoder)

        def read(group: tuple[int, list[int]]) -> dict[int, NDArray[np.uint8]]:
            decoder = idle.get()
            try:
                return decoder.read(*group)
            finally:
                idle.put(decoder)

        with ThreadPoolExecutor(num_decoders, "video-llama-frames") as threads:
            # A thread does not know of `limit_frames` unless it runs in a copy of this one's context.
            parts = [threads.submit(copy_context().run, read, group) for group in groups.items()]
            try:
                return [part.result() for part in parts]
            finally:
                threads.shutdown(wait=True, cancel_futures=True)


class AnimationReader:
    """A `VideoReader` of an animated WebP or PNG file: Pillow puts its frames together, FFmpeg reads no such WebP.

    Args:
        path: the file.
        image: it, opened.
        height, width: size the frames are scaled to.

    Raises:
        MediaError: a frame is damaged, or they are too large.
    """

    def __init__(self, path: str | os.PathLike[str], image: Image.Image, height: int, width: int) -> None:
        self._path, self._image, self._size = path, image, (height, width)
        pixels = image.width * image.height
        if pixels > min(max_frame_pixels.get(), _MAX_ANIMATION_FRAME):
            raise MediaError(path, f"frames of {image.width}x{image.height} are too large")
        if pixels * getattr(image, "n_frames", 1) > _MAX_ANIMATION:
            raise MediaError(path, "an animation of too many frames for their size", "convert it to an .mp4 file")
        self.times_seconds: list[float] = []
        seconds = 0.0
        with translate_image_errors(path):
            # An animated PNG may begin with an image for old viewers, which is no frame.
            self._first = int(getattr(image, "default_image", False))
            for number in range(self._first, getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()
                self.times_seconds.append(seconds)
                # "As soon as possible": browsers wait as long.
                seconds += (image.info.get("duration") or 100) / 1000
        self.num_frames = len(self.times_seconds)
        self.duration_seconds = seconds
        self.fps = self.num_frames / seconds

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames by ascending index; see `VideoReader.read`."""
        found: dict[int, NDArray[np.uint8]] = {}
        scaler = FrameScaler(self._path, self._size)
        with translate_image_errors(self._path):
            for index in sorted(set(indices)):
                self._image.seek(self._first + index)
                pixels = np.asarray(to_rgb(ImageOps.exif_transpose(self._image)))
                frame = VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 1000)
                found[index] = scaler.scale(frame)
        return np.stack(list(map(found.__getitem__, indices)))


class _Decoder:
    """One decoder on an open file.

    Args:
        path: the file.
        files: what else is opened stays open until this is closed.
        container: the file, opened.
        index: of its video stream.
        size: (height, width) the frames are scaled to.
        num_threads: of the codec.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        files: ExitStack,
        container: InputContainer,
        index: FrameIndex,
        size: tuple[int, int],
        num_threads: int,
    ) -> None:
        self._path = path
        self._reopened = files.enter_context(ExitStack())
        self._index = index
        self._num_threads = num_threads
        self._scaler = FrameScaler(path, size)
        # The first frame that decoding from the very start gives; a broadcast may begin between two keyframes.
        self._first_position = 0
        self._use(container)

    def _use(self, container: InputContainer) -> None:
        self._container = container
        self._stream = cast(VideoStream, select_stream(container, self._path, "video"))
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = self._num_threads
        # The size may change midway.
        self._stream.codec_context.options = {"max_pixels": str(max_frame_pixels.get())}

    def read(self, start: int, wanted: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
        """Scaled frames by index.

        Args:
            start: the keyframe they are decoded from.
            wanted: their indices, ascending.

        Raises:
            MediaError: one of them cannot be decoded.
        """
        frames = self._collect(start, wanted)
        # The file may call frames keyframes that are none, and the demuxer's own index may lead past one.
        if len(frames) < len(wanted):
            frames = self._collect(0, wanted, is_reopened=True)
        if len(frames) < len(wanted):
            missing = next(index for index in wanted if index not in frames)
            raise MediaError(self._path, f"frame {missing} of {self._index.num_frames} cannot be decoded")
        return frames

    def _collect(self, start: int, wanted: Sequence[int], is_reopened: bool = False) -> dict[int, NDArray[np.uint8]]:
        """Scaled frames by index, decoded from the keyframe `start` on; none where decoding cannot begin there.

        For a frame that the decoder leaves out, the one on the screen at its time is taken. With `is_reopened` nothing
        is sought: whatever comes first in the file is its start.
        """
        pending = deque(wanted)
        found: dict[int, NDArray[np.uint8]] = {}
        previous: VideoFrame | None = None
        if is_reopened:
            self._reopen()
        else:
            self._go_to(start)
        for position, frame in self._decode(start, set(wanted)):
            if previous is None and is_reopened:
                self._first_position = position
            # Frames before it may be shown first, but from a true keyframe on they are all decoded.
            elif previous is None and self._is_past(start, position, frame):
                return found
            while pending and pending[0] < position:
                found[pending.popleft()] = self._scaler.scale(previous or frame)
            if pending and pending[0] == position:
                found[pending.popleft()] = self._scaler.scale(frame)
            if not pending:
                return found
            if position >= start:
                previous = frame
        # Nothing follows the last frame, as where the file ends with a comment.
        while pending and previous is not None:
            found[pending.popleft()] = self._scaler.scale(previous)
        return found

    def _is_past(self, start: int, position: int, frame: VideoFrame) -> bool:
        """Return whether what comes first behind a seek to `start` is another frame, or is no keyframe."""
        if not start:
            return position > self._first_position
        return position > start or (position == start and not frame.key_frame)

    def _go_to(self, start: int) -> None:
        """Go to a keyframe; without times to seek by, to the very start."""
        index = self._index
        if index.times is not None:
            try:
                self._container.seek(index.keyframes.get(start, index.rewind_time), stream=self._stream)
                return
            except FFmpegError:
                # Opened again, it is at its start.
                pass
        self._reopen()

    def _reopen(self) -> None:
        self._reopened.close()
        self._use(self._reopened.enter_context(open_container(self._path)))

    def count_delay(self) -> int:
        """Return how many packets the decoder takes before the one that gives the first frame."""
        self._go_to(0)
        # Each further thread delays it by one.
        self._stream.codec_context.thread_count = 1
        for number, packet in enumerate(demux_packets(self._container, self._stream, self._path)):
            if packet.size and packet.decode():
                return number
        return 0

    def _decode(self, start: int, wanted: set[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Frames with their indices from here, the keyframe `start`, on; pictures nobody needs may be left out."""
        index, context = self._index, self._stream.codec_context
        can_skip = index.times is not None and context.name in _CODECS_WITH_SKIPPABLE_FRAMES
        wanted_times: set[int] = set()
        if index.times is not None:
            wanted_times.update(map(index.times.__getitem__, wanted))
        count = 0
        for number, packet in enumerate(demux_packets(self._container, self._stream, self._path)):
            if number == 0 and start and not packet.is_keyframe:
                # The demuxer went past the keyframe.
                return
            if can_skip:
                context.skip_frame = "NONREF"
                if not number or not packet.size or packet.pts in wanted_times:
                    context.skip_frame = "DEFAULT"
            with translate_errors(self._path, f"the video is damaged near frame {start + count}"):
                frames: Sequence[Any] = packet.decode()
            for frame in frames:
                self._scaler.follow(frame)
                # The frame on the screen at this time; without times, frames are counted.
                position = start + count
                if index.times is not None and frame.pts is not None:
                    position = bisect.bisect_right(index.times, frame.pts) - 1
                yield position, frame
                count += 1
