"""Read video frames through PyAV: frame-exact, and scaled as in the reference implementation.

The reference decodes with decord 0.6.0, which scales inside FFmpeg's filter graph with the bilinear filter
that was FFmpeg's default then. The graph built here gives the same pixels, bit by bit.
"""

from __future__ import annotations

import bisect
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
from av import VideoFrame
from av.container import InputContainer
from av.filter import Graph
from av.packet import Packet
from av.video.stream import VideoStream
from numpy.typing import NDArray

from video_llama.errors import MediaError
from video_llama.processor.containers import (
    demux_packets,
    max_frame_pixels,
    open_container,
    select_stream,
    translate_errors,
)
from video_llama.processor.mp4_index import FrameTimes, read_frame_times
from video_llama.processor.video import num_decoder_threads
from video_llama.registry import VIDEO_READERS

__all__ = ["PyAVReader", "open_pyav"]

# Codecs whose "non-reference" pictures nothing else is decoded from, so that unwanted ones need not be
# decoded. (HEVC's may still be referred to by higher temporal layers.)
_CODECS_WITH_SKIPPABLE_FRAMES = {"h264", "mpeg2video", "mpeg4"}

# AVI stores no presentation times and MPEG program streams few: what FFmpeg makes up for them is not
# reliable.
_FORMATS_WITHOUT_TIMES = {"avi", "mpeg"}
_FORMATS_SOUGHT_BY_DECODING_TIME = {"mpegts"}

# A rate that a header gives as a whole number, or frame times rounded to milliseconds, are off by less.
_RATE_TOLERANCE = 0.05

# The display matrix gives a turn in degrees, counter-clockwise.
_ROTATION_FILTERS = {
    0: [],
    90: [("transpose", "cclock")],
    180: [("hflip", ""), ("vflip", "")],
    270: [("transpose", "clock")],
}


@VIDEO_READERS.register("pyav")
@contextmanager
def open_pyav(path: str | os.PathLike[str], height: int, width: int) -> Iterator[PyAVReader]:
    """Open a video with PyAV; an `OpenVideoReader`.

    Raises:
        MediaError: the file is no video or is damaged.
    """
    with open_container(path) as container:
        yield PyAVReader(path, container, height, width)


class PyAVReader:
    """A `VideoReader` on an open container.

    Args:
        path: for messages.
        container: where the video is read from; stays the caller's to close.
        height, width: size the frames are scaled to.

    Raises:
        MediaError: no video stream, no frames, or a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str], container: InputContainer, height: int, width: int) -> None:
        self._path = path
        self._container = container
        self._stream = cast(VideoStream, select_stream(container, path, "video"))
        if self._stream.width * self._stream.height > max_frame_pixels():
            raise MediaError(path, f"frames of {self._stream.width}x{self._stream.height} are too large")
        self._index = self._read_index()
        if not self._index.num_frames:
            raise MediaError(path, "the video has no frames")
        self._scaler = _FrameScaler(height, width)
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = num_decoder_threads()
        self._stream.codec_context.options = {"max_pixels": str(max_frame_pixels())}  # the size may change midway
        self.num_frames = self._index.num_frames
        self.fps = self._average_rate()

    def _average_rate(self) -> float:
        """Frames per second: what the file says, unless its header does not count the frames and is far off.

        Browsers record WebM files with as many frames as they find time for, and a header that speaks of 30 a second.
        """
        stated = float(self._stream.average_rate or self._stream.guessed_rate or 1)
        times = self._index.times
        if self._stream.frames or times is None or times[0] == times[-1] or self._stream.time_base is None:
            return stated
        measured = (len(times) - 1) / float((times[-1] - times[0]) * self._stream.time_base)
        return stated if abs(stated - measured) <= _RATE_TOLERANCE * measured else measured

    def _read_index(self) -> _FrameIndex:
        """From the tables of the file where it has some, so that a long one is not read; else from all packets."""
        times = read_frame_times(self._path, self._container, self._stream)
        if times is not None:
            return _index_times(times)
        return _index_frames(demux_packets(self._container, self._stream, self._path), self._container.format.name)

    def read(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Frames by ascending index; see `VideoReader.read`."""
        found: dict[int, NDArray[np.uint8]] = {}
        for start, wanted in self._index.group_by_keyframe(indices).items():
            frames = self._collect(start, wanted)
            if len(frames) < len(wanted):  # the demuxer's own index led past the keyframe
                frames = self._collect(0, wanted)
            if len(frames) < len(wanted):
                missing = next(index for index in wanted if index not in frames)
                raise MediaError(self._path, f"frame {missing} of {self.num_frames} cannot be decoded")
            found.update(frames)
        return np.stack([found[index] for index in indices])

    def _collect(self, start: int, wanted: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
        """Scaled frames by index, decoded from the keyframe `start` on; may end early.

        For a frame that the decoder leaves out, the one on the screen at its time is taken.
        """
        pending = deque(wanted)
        found: dict[int, NDArray[np.uint8]] = {}
        previous: VideoFrame | None = None
        for position, frame in self._decode(start, set(wanted)):
            while pending and pending[0] < position:
                if previous is None and start:
                    return found
                found[pending.popleft()] = self._scaler(frame if previous is None else previous)
            if pending and pending[0] == position:
                found[pending.popleft()] = self._scaler(frame)
            if not pending:
                break
            previous = frame
        return found

    def _decode(self, start: int, wanted: set[int]) -> Iterator[tuple[int, VideoFrame]]:
        """Frames with their indices from the keyframe `start` on; pictures nobody needs may be left out."""
        index, context = self._index, self._stream.codec_context
        can_skip = index.times is not None and context.name in _CODECS_WITH_SKIPPABLE_FRAMES
        wanted_times = {index.times[position] for position in wanted} if index.times is not None else set()
        with translate_errors(self._path, "its format lacks the times of the frames"):
            self._container.seek(index.seek_time(start), stream=self._stream)
        count = 0
        for number, packet in enumerate(demux_packets(self._container, self._stream, self._path)):
            if number == 0 and start and not packet.is_keyframe:
                return  # the demuxer went past the keyframe
            if can_skip:
                context.skip_frame = "DEFAULT" if not packet.size or packet.pts in wanted_times else "NONREF"
            with translate_errors(self._path, f"the video is damaged near frame {start + count}"):
                frames = packet.decode()
            for frame in frames:
                yield index.position(frame.pts, start + count), frame
                count += 1


@dataclass(frozen=True)
class _FrameIndex:
    """Where the frames of a stream are, from its packets alone.

    Attributes:
        num_frames: packets that show a frame.
        times: presentation times in the stream's time base, ascending; None if they are unknown. Then
            frames are counted from the start.
        keyframes: indices of the frames where decoding can start, ascending, and where to send the demuxer
            for each.
        rewind_time: where to send the demuxer for the very first packet.
    """

    num_frames: int
    times: list[int] | None
    keyframes: dict[int, int]
    rewind_time: int

    def group_by_keyframe(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """For each keyframe that is needed, the frames to decode from there; without repeats."""
        keyframes = list(self.keyframes)
        groups: dict[int, list[int]] = {}
        for index in sorted(set(indices)):
            position = bisect.bisect_right(keyframes, index) - 1
            groups.setdefault(keyframes[position] if position >= 0 else 0, []).append(index)
        return groups

    def seek_time(self, start: int) -> int:
        """Where to send the demuxer for decoding from frame `start` on."""
        return self.keyframes[start] if start else self.rewind_time

    def position(self, time: int | None, count: int) -> int:
        """Index of the frame shown at `time`, or `count` if times are unknown."""
        if self.times is None or time is None:
            return count
        return bisect.bisect_right(self.times, time) - 1


def _index_frames(packets: Iterable[Packet], format_name: str) -> _FrameIndex:
    num_frames, rewind_time = 0, 0
    times: list[int] = []
    keyframe_times: list[tuple[int, int]] = []  # when it is shown, and where to send the demuxer for it
    for packet in packets:  # the packets hold the whole file: none may be kept
        if not packet.size or packet.is_discard:
            continue
        num_frames += 1
        rewind_time = min(rewind_time, *(time for time in (packet.pts, packet.dts) if time is not None), 0)
        if packet.pts is not None:
            times.append(packet.pts)
            seek_time = packet.dts if format_name in _FORMATS_SOUGHT_BY_DECODING_TIME else packet.pts
            if packet.is_keyframe and seek_time is not None:
                keyframe_times.append((packet.pts, seek_time))
    if len(times) < num_frames or format_name in _FORMATS_WITHOUT_TIMES:
        return _FrameIndex(num_frames, None, {}, rewind_time)
    times.sort()
    keyframes = {bisect.bisect_left(times, shown): seek_time for shown, seek_time in sorted(keyframe_times)}
    return _FrameIndex(num_frames, times, keyframes, rewind_time)


def _index_times(known: FrameTimes) -> _FrameIndex:
    keyframes = {bisect.bisect_left(known.times, time): time for time in known.keyframe_times}
    return _FrameIndex(len(known.times), known.times, keyframes, min(known.first_time, 0))


class _FrameScaler:
    """Turns a decoded frame upright and into RGB of one size."""

    def __init__(self, height: int, width: int) -> None:
        self._height = height
        self._width = width
        self._graph: Graph | None = None
        self._graph_is_for: tuple[int, int, str, int] | None = None

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        rotation = round(frame.rotation / 90) * 90 % 360
        key = (frame.width, frame.height, frame.format.name, rotation)
        if self._graph is None or key != self._graph_is_for:
            self._graph, self._graph_is_for = self._build_graph(frame, rotation), key
        self._graph.push(frame)
        return cast(NDArray[np.uint8], cast(VideoFrame, self._graph.pull()).to_ndarray())

    def _build_graph(self, frame: VideoFrame, rotation: int) -> Graph:
        graph = Graph()
        graph.threads = 1  # scaling one frame is over before other threads have woken up
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        filters = [
            *_ROTATION_FILTERS[rotation],
            ("scale", f"w={self._width}:h={self._height}:flags=bilinear"),
            ("format", "rgb24"),
            ("buffersink", ""),
        ]
        graph.link_nodes(source, *(graph.add(name, arguments) for name, arguments in filters)).configure()
        return graph
