"""The times of all frames of an MP4 file from its index alone (ISO/IEC 14496-12), without reading the frames.

FFmpeg reads the same tables but tells only part of what is in them. What is read here is compared with what FFmpeg
says of both ends of the stream; wherever the two could differ, there is no answer, and the packets must be read.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray

__all__ = ["FrameTimes", "read_frame_times"]

_NUM_COMPARED = 32  # packets, and entries of FFmpeg's index at its end
_BEFORE_ALL = -(2**40)  # in any time base
_MAX_SAMPLES = 2**26  # 25 days at 30 frames a second; a damaged table can claim any number


@dataclass(frozen=True)
class FrameTimes:
    """When the frames of a stream are shown, in its time base.

    Attributes:
        times: presentation times, ascending.
        keyframe_times: those of the frames where decoding can start, ascending.
        first_time: the earliest decoding or presentation time.
    """

    times: list[int]
    keyframe_times: list[int]
    first_time: int


def read_frame_times(path: str | os.PathLike[str], container: InputContainer, stream: VideoStream) -> FrameTimes | None:
    """Read the tables of a stream's track.

    Args:
        path: the file.
        container: the same file, opened. It is left somewhere near its start; at the very start if there is no
            answer.
        stream: one of its streams.

    Returns:
        the times; None for another format, for a file in fragments, for one that an edit list cuts, and for every
        file with PyAV before 17, which does not tell what FFmpeg read.
    """
    if "mp4" not in container.format.name.split(",") or not hasattr(stream, "index_entries"):
        return None
    try:
        with open(path, "rb") as file:
            decoding, shown, is_key = _read_track(file, stream.id)
    except (
        KeyError,
        ValueError,
        IndexError,
        OSError,
        struct.error,
    ):  # no such table, or a damaged one: FFmpeg makes what it can of it
        return None
    shifts = _shifts_by_ffmpeg(container, stream, decoding, shown)
    if shifts is None:
        container.seek(_BEFORE_ALL, stream=stream)
        return None
    decoding, shown = decoding + shifts[0], shown + shifts[1]
    first_time = min(int(shown.min()), int(decoding[0]))
    return FrameTimes(np.sort(shown).tolist(), np.sort(shown[is_key]).tolist(), first_time)


def _shifts_by_ffmpeg(
    container: InputContainer, stream: VideoStream, decoding: NDArray[np.int64], shown: NDArray[np.int64]
) -> tuple[int, int] | None:
    """What FFmpeg adds to decoding and presentation times; None if that varies, or if frames are cut away."""
    entries = stream.index_entries
    if not len(decoding) or len(entries) != len(decoding):
        return None
    compared = min(_NUM_COMPARED, len(decoding))
    last = range(len(decoding) - compared, len(decoding))
    if any(entries[number].is_discard for number in last):
        return None
    of_decoding = {entries[number].timestamp - int(decoding[number]) for number in last}
    of_showing: set[int] = set()
    for number, packet in enumerate(islice(container.demux(stream), compared)):
        if not packet.size or packet.dts is None or packet.pts is None or packet.is_discard or packet.is_corrupt:
            return None
        of_decoding.add(packet.dts - int(decoding[number]))
        of_showing.add(packet.pts - int(shown[number]))
    if len(of_decoding) != 1 or len(of_showing) != 1:
        return None
    return of_decoding.pop(), of_showing.pop()


def _read_track(file: BinaryIO, track_id: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Decoding times, presentation times and whether it is a keyframe, of each sample in decoding order."""
    for name, track in _boxes(file, *_find(file, "moov")):
        if name == "trak" and _track_id(file, *track) == track_id:
            tables = track
            for inner in ("mdia", "minf", "stbl"):
                tables = dict(_boxes(file, *tables))[inner]
            return _read_tables(file, dict(_boxes(file, *tables)))
    raise KeyError("trak")


def _read_tables(
    file: BinaryIO, boxes: dict[str, tuple[int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    durations = _expand(_table(file, boxes["stts"], ">u4", 2))
    decoding = np.concatenate([[0], np.cumsum(durations)])[:-1].astype(np.int64)
    shown = decoding
    if "ctts" in boxes:  # FFmpeg, too, takes these for signed in every version of the table
        offsets = _expand(_table(file, boxes["ctts"], ">i4", 2))
        shown = decoding + offsets[: len(decoding)]
    is_key = np.ones(len(decoding), dtype=bool)
    if "stss" in boxes:
        is_key[:] = False
        is_key[_table(file, boxes["stss"], ">u4", 1)[:, 0] - 1] = True
    return decoding, shown, is_key


def _expand(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Runs (count, value), one a row, as values."""
    if runs[:, 0].sum() > _MAX_SAMPLES or (runs[:, 0] < 0).any():
        raise ValueError("a table claims too many samples")
    return np.repeat(runs[:, 1], runs[:, 0])


def _table(file: BinaryIO, box: tuple[int, int], kind: str, columns: int) -> NDArray[np.int64]:
    """A table of 32-bit numbers: (rows, columns)."""
    start, end = box
    file.seek(start + 4)  # version and flags
    (rows,) = struct.unpack(">I", file.read(4))
    size = rows * columns * 4
    if start + 8 + size > end:
        raise ValueError("a table is longer than its box")
    return np.frombuffer(file.read(size), dtype=kind).reshape(rows, columns).astype(np.int64)


def _track_id(file: BinaryIO, start: int, end: int) -> int:
    header, _ = dict(_boxes(file, start, end))["tkhd"]
    file.seek(header)
    is_long = file.read(1) == b"\x01"  # version 1 has 64-bit dates
    file.seek(header + (20 if is_long else 12))
    return int(struct.unpack(">I", file.read(4))[0])


def _find(file: BinaryIO, wanted: str) -> tuple[int, int]:
    for name, box in _boxes(file, 0, file.seek(0, io.SEEK_END)):
        if name == wanted:
            return box
    raise KeyError(wanted)


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and content (from, to) of the boxes between two positions of the file."""
    while start + 8 <= end:
        file.seek(start)
        size, name = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            (size,) = struct.unpack(">Q", file.read(8))
            header = 16
        stop = start + size if size else end
        if stop > end or stop < start + header:
            raise ValueError("a box is longer than what it is in")
        yield name.decode("latin-1"), (start + header, stop)
        start = stop
