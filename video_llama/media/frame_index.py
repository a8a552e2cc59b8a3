"""Which frames a video stream has, when they are shown, and where decoding can start for each of them.

The times of an MP4 file's frames are read from its index alone (ISO/IEC 14496-12), without reading the frames.
FFmpeg reads the same tables but tells only part of what is in them. What is read here is compared with what FFmpeg
says of both ends of the stream; wherever the two could differ, and for other formats, all packets are read.
"""

from __future__ import annotations

import bisect
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from av import ContainerFormat
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream
from numpy.typing import NDArray

from video_llama.media.containers import demux_packets, translate_errors
from video_llama.media.sampling import frame_seconds
from video_llama.media.signatures import has_gif_image

__all__ = ["FrameIndex", "clock_jumps", "first_frame_seconds", "index_frames", "read_mp4_index"]

# AVI stores no presentation times and MPEG program streams few: what FFmpeg makes up for them is not
# reliable.
_FORMATS_WITHOUT_TIMES = {"avi", "mpeg"}
_FORMATS_SOUGHT_BY_DECODING_TIME = {"flv", "mpegts"}
_FORMATS_THAT_JOIN = {"mpeg", "mpegts"}
# Bare streams of a codec: AVFMT_NOTIMESTAMPS. The times that FFmpeg makes up for them change with each seek.
_NO_TIMES_FLAG = 0x80

# What a time of whole milliseconds is off by, and one that FFmpeg makes up from a stream's rate and few times.
_ROUNDING_SECONDS = 0.001
_GUESS_SECONDS = 0.1

# Packets, and entries of FFmpeg's index at its end.
_NUM_COMPARED = 32
# In any time base.
_BEFORE_ALL = -(2**40)
# 25 days at 30 frames a second; a damaged table can claim any number.
_MAX_SAMPLES = 2**26
_BOX_HEADER = struct.Struct(">I4s")

_Boxes = dict[str, list[tuple[int, int]]]
"""Contents of boxes, from and to, by name."""


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of a stream are.

    Attributes:
        num_frames: packets that show a frame.
        times: presentation times in the stream's time base, ascending; None if they are unknown. Then
            frames are counted from the start.
        keyframes: indices of the frames where decoding can start, ascending, and where to send the demuxer
            for each.
        rewind_time: where to send the demuxer for the very first packet.
        shown_at: when each frame is shown, in the stream's time base, ascending: `times`, or the times of decoding
            where only those are known; None for a bare stream without any.
        last_duration: how long the last one is shown; 0 if the file does not say.
        tolerance_seconds: what these times may be rounded by.
        jumps: whether the clock jumps back, where recordings were put together; `shown_at` goes on there.
    """

    num_frames: int
    times: list[int] | None
    keyframes: dict[int, int]
    rewind_time: int
    shown_at: list[int] | None
    last_duration: int
    tolerance_seconds: float = _ROUNDING_SECONDS
    jumps: bool = False

    def seconds(self, stream: VideoStream, fps: float) -> tuple[float, list[float], float]:
        """Return times in seconds, for a stream of that average rate.

        Returns:
            when the first frame is shown, on the clock that the file's streams share; when each one is shown, counted
            from the first; and when the last one ends, counted likewise.
        """
        if self.shown_at is None or stream.time_base is None:
            return 0.0, [index / fps for index in range(self.num_frames)], self.num_frames / fps
        base, tick = stream.time_base, float(stream.time_base)
        # The one division of two whole numbers is exact to the last digit.
        stated = np.asarray(self.shown_at) * base.numerator / base.denominator
        tolerance = max(tick, self.tolerance_seconds)
        return float(stated[0]), *frame_seconds(stated, self.last_duration * tick, fps, tolerance)

    def counted(self) -> FrameIndex:
        """Return it for a stream that is to be decoded from its start, with its frames counted."""
        return replace(self, times=None, keyframes={})

    def delayed(self, count: int) -> FrameIndex:
        """Return it for a decoder that gives the first frame after so many packets more, where only times of decoding
        are known: each frame is shown when the packet is decoded that so many others precede."""
        decoded = self.shown_at or []
        step = decoded[-1] - decoded[-2]
        # The file does not say of the last ones.
        return replace(self, shown_at=decoded[count:] + [decoded[-1] + step * (number + 1) for number in range(count)])

    def group_by_keyframe(self, indices: Sequence[int]) -> dict[int, list[int]]:
        """For each keyframe that is needed, the frames to decode from there; without repeats."""
        keyframes = list(self.keyframes)
        groups: dict[int, list[int]] = {}
        for index in sorted(set(indices)):
            position = bisect.bisect_right(keyframes, index) - 1
            start = 0
            if position >= 0:
                start = keyframes[position]
            groups.setdefault(start, []).append(index)
        return groups


def first_frame_seconds(path: str | os.PathLike[str], container: InputContainer) -> float | None:
    """Return when the first frame of a file's video is shown, on the container's clock; None without video.

    FFmpeg's own `start_time` is the file's for a stream that begins late. The container is left behind some packets.

    Raises:
        MediaError: the file is damaged.
    """
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        return None
    shown = (packet for packet in demux_packets(container, stream, path) if not packet.is_discard)
    index = index_frames(islice(shown, _NUM_COMPARED), container.format)
    if not index.shown_at:
        return None
    return index.seconds(stream, 1.0)[0]


def clock_jumps(path: str | os.PathLike[str], container: InputContainer, stream: Stream) -> bool | None:
    """Return whether the clock of a stream jumps back, from its packets; None in a format that cannot be put together
    byte by byte, where none are read."""
    if container.format.name not in _FORMATS_THAT_JOIN:
        return None
    latest: int | None = None
    for packet in demux_packets(container, stream, path):
        if packet.dts is not None:
            if latest is not None and packet.dts < latest:
                return True
            latest = packet.dts
    return False


def index_frames(packets: Iterable[Packet], container_format: ContainerFormat) -> FrameIndex:
    """From all packets of a stream in a container of this format."""
    format_name = container_format.name
    num_frames, rewind_time, added, jumps = 0, 0, 0, False
    # Pairs of time and duration, and when a keyframe is shown with where to send the demuxer for it.
    shown: list[tuple[int, int]] = []
    decoded: list[tuple[int, int]] = []
    keyframe_times: list[tuple[int, int]] = []
    # The packets hold the whole file: none may be kept.
    for packet in packets:
        if not packet.size or packet.is_discard or (format_name == "gif" and not has_gif_image(bytes(packet))):
            continue
        num_frames += 1
        rewind_time = min(rewind_time, *(time for time in (packet.pts, packet.dts) if time is not None), 0)
        if packet.dts is not None:
            # Recordings that were put together begin again at their own zero.
            if decoded and packet.dts + added < decoded[-1][0]:
                jumps = True
                added = sum(decoded[-1]) - packet.dts
            decoded.append((packet.dts + added, packet.duration or 0))
        if packet.pts is not None:
            shown.append((packet.pts + added, packet.duration or 0))
            seek_time = packet.dts if format_name in _FORMATS_SOUGHT_BY_DECODING_TIME else packet.pts
            if packet.is_keyframe and seek_time is not None:
                keyframe_times.append((packet.pts, seek_time))
    has_times = len(shown) == num_frames and format_name not in _FORMATS_WITHOUT_TIMES
    # Frames are shown as far apart as they are decoded, in order; AVI files leave numbers out where a frame stays.
    stated = shown if has_times else decoded
    if not num_frames or len(stated) < num_frames or container_format.flags & _NO_TIMES_FLAG:
        return FrameIndex(num_frames, None, {}, rewind_time, None, 0)
    stated.sort()
    shown_at = [time for time, _ in stated]
    keyframes = {bisect.bisect_left(shown_at, time): seek_time for time, seek_time in sorted(keyframe_times)}
    tolerance = _GUESS_SECONDS if format_name == "mpeg" else _ROUNDING_SECONDS
    index = FrameIndex(num_frames, shown_at, keyframes, rewind_time, shown_at, stated[-1][1], tolerance, jumps)
    if has_times and not jumps:
        return index
    return index.counted()


def read_mp4_index(path: str | os.PathLike[str], container: InputContainer, stream: VideoStream) -> FrameIndex | None:
    """Read the tables of a stream's track.

    Args:
        path: the file.
        container: the same file, opened. It is left somewhere near its start; at the very start if there is no
            answer.
        stream: one of its streams.

    Returns:
        the index; None for another format, for a file in fragments, for one that an edit list cuts, and for every
        file with PyAV before 17, which does not tell what FFmpeg read.
    """
    if "mp4" not in container.format.name.split(",") or not hasattr(stream, "index_entries"):
        return None
    try:
        with open(path, "rb") as file:
            decoding, shown, durations, is_key = _read_track(file, stream.id)
    except (KeyError, ValueError, IndexError, OSError, struct.error):
        # No such table, or a damaged one: FFmpeg makes what it can of it.
        return None
    # Without a single frame, as in the first part of a stream in fragments, the container cannot be sought in.
    if not len(decoding):
        return None
    shifts = _shifts_by_ffmpeg(container, stream, decoding, shown)
    if shifts is None:
        with translate_errors(path, "its frames cannot be sought"):
            container.seek(_BEFORE_ALL, stream=stream)
        return None
    decoding, shown = decoding + shifts[0], shown + shifts[1]
    times = np.sort(shown).tolist()
    keyframes = {}
    for time in np.sort(shown[is_key]).tolist():
        keyframes[bisect.bisect_left(times, time)] = time
    rewind_time = min(int(times[0]), int(decoding[0]), 0)
    return FrameIndex(len(times), times, keyframes, rewind_time, times, int(durations[np.argmax(shown)]))


def _shifts_by_ffmpeg(
    container: InputContainer, stream: VideoStream, decoding: NDArray[np.int64], shown: NDArray[np.int64]
) -> tuple[int, int] | None:
    """Return what FFmpeg adds to decoding and presentation times; None if that varies, or if frames are cut away."""
    entries: Any = getattr(stream, "index_entries", ())
    if len(entries) != len(decoding):
        return None
    compared = min(_NUM_COMPARED, len(decoding))
    of_decoding: set[int] = set()
    of_showing: set[int] = set()
    for number in range(len(decoding) - compared, len(decoding)):
        entry = entries[number]
        if entry.is_discard:
            return None
        of_decoding.add(entry.timestamp - int(decoding[number]))
    for number, packet in enumerate(islice(container.demux(stream), compared)):
        if not packet.size or packet.dts is None or packet.pts is None or packet.is_discard or packet.is_corrupt:
            return None
        of_decoding.add(packet.dts - int(decoding[number]))
        of_showing.add(packet.pts - int(shown[number]))
    if len(of_decoding) != 1 or len(of_showing) != 1:
        return None
    return of_decoding.pop(), of_showing.pop()


def _read_track(
    file: BinaryIO, track_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return decoding and presentation times, durations and whether it is a keyframe, of each sample as decoded.

    Raises:
        KeyError, ValueError, IndexError, struct.error: there is no such track or table, or it is damaged.
    """
    movie = _boxes(file, (0, file.seek(0, os.SEEK_END)), last="moov")["moov"][0]
    for track in _boxes(file, movie)["trak"]:
        boxes = _boxes(file, track)
        file.seek(boxes["tkhd"][0][0])
        header = file.read(24)
        # Version 1 has 64-bit dates.
        place = 20 if header[0] == 1 else 12
        if int.from_bytes(header[place : place + 4], "big") == track_id:
            break
    else:
        raise KeyError(track_id)
    for inner in ("mdia", "minf", "stbl"):
        boxes = _boxes(file, boxes[inner][0])
    durations = _table(file, boxes["stts"][0], ">u4", runs=True)
    decoding = np.concatenate([[0], np.cumsum(durations)])[:-1].astype(np.int64)
    shown = decoding
    if "ctts" in boxes:
        # FFmpeg, too, takes these for signed in every version of the table.
        shown = decoding + _table(file, boxes["ctts"][0], ">i4", runs=True)[: len(decoding)]
    is_key = np.ones(len(decoding), dtype=bool)
    if "stss" in boxes:
        is_key[:] = False
        is_key[_table(file, boxes["stss"][0], ">u4", runs=False) - 1] = True
    return decoding, shown, durations, is_key


def _table(file: BinaryIO, box: tuple[int, int], kind: str, runs: bool) -> NDArray[np.int64]:
    """Return the 32-bit numbers of a table; with `runs` its rows are (count, value) and each value is repeated."""
    columns = 1 + runs
    start, end = box
    # Behind version and flags comes the number of rows.
    file.seek(start + 4)
    (rows,) = struct.unpack(">I", file.read(4))
    size = rows * columns * 4
    if start + 8 + size > end:
        raise ValueError("a table is longer than its box")
    numbers = np.frombuffer(file.read(size), dtype=kind).reshape(rows, columns).astype(np.int64)
    if not runs:
        return numbers[:, 0]
    if numbers[:, 0].sum() > _MAX_SAMPLES or (numbers[:, 0] < 0).any():
        raise ValueError("a table claims too many samples")
    return np.repeat(numbers[:, 1], numbers[:, 0])


def _boxes(file: BinaryIO, within: tuple[int, int], last: str = "") -> _Boxes:
    """Return the contents (from, to) of the boxes between two positions of the file, by name.

    Args:
        file: the file.
        within: the two positions.
        last: stop after the first box of this name.
    """
    found: _Boxes = {}
    start, end = within
    while start + 8 <= end and last not in found:
        file.seek(start)
        size, name = _BOX_HEADER.unpack(file.read(8))
        header = 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
            header = 16
        stop = end
        if size:
            stop = start + size
        if stop > end or stop < start + header:
            raise ValueError("a box is longer than what it is in")
        found.setdefault(name.decode("latin-1"), []).append((start + header, stop))
        start = stop
    return found
