"""Decoded frames to RGB of one size, upright: turned and mirrored as the file says, in the colours that it states."""

from __future__ import annotations

import logging
import os
import struct
from functools import lru_cache
from typing import Any, cast

import numpy as np
from av import VideoFrame
from av.filter import Graph
from av.sidedata.sidedata import Type as SideDataType
from numpy.typing import NDArray

__all__ = ["FrameScaler", "is_mirrored"]

logger = logging.getLogger(__name__)

# Of ITU-T H.273: what FFmpeg converts to RGB. The others (YCgCo, ICtCp, Dolby Vision's IPT, …) it took for BT.601 up to
# version 7, as it still takes what is unspecified; BT.2020 with constant luminance it took for that without.
_CONVERTED_MATRICES = {0, 1, 2, 4, 5, 6, 7, 9}
_UNSPECIFIED = 2
_STAND_INS = {10: 9}
# FFmpeg 8.1 has 33 kinds of side data.
_MOST_KINDS_OF_SIDE_DATA = 64
_NAMES = {_UNSPECIFIED: "BT.601", 9: "BT.2020 with non-constant luminance"}


class FrameScaler:
    """Scales the frames of one video as the reference implementation does.

    Args:
        path: the file, for messages.
        size: (height, width) of the result.
    """

    def __init__(self, path: str | os.PathLike[str], size: tuple[int, int]) -> None:
        self._path = path
        self._size = size
        self._graph: Graph | None = None
        self._graph_is_for: tuple[int, int, str, int] | None = None
        # A codec's own message of how to turn frames holds until the next keyframe.
        self._turned_as: VideoFrame | None = None

    def follow(self, frame: VideoFrame) -> None:
        """Look at each decoded frame in turn, wanted or not: it may say how those after it are turned."""
        if frame.key_frame or frame.rotation:
            self._turned_as = frame

    def scale(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Return a decoded frame upright: (height, width, 3), uint8, RGB."""
        # The matrix itself is read for the first frame and after a turn: to look at it keeps a frame in memory.
        if frame.colorspace not in _CONVERTED_MATRICES:
            stand_in = _STAND_INS.get(frame.colorspace, _UNSPECIFIED)
            _warn_of_matrix(os.fspath(self._path), frame.colorspace, _NAMES[stand_in])
            frame.colorspace = stand_in
        if hasattr(frame, "color_trc"):
            # They change nothing here, but FFmpeg refuses unknown ones. (PyAV 15 cannot set them.)
            frame.color_primaries = frame.color_trc = _UNSPECIFIED
        turned_as = self._turned_as or frame
        key = (frame.width, frame.height, frame.format.name, turned_as.rotation)
        if self._graph is None or key != self._graph_is_for:
            self._graph, self._graph_is_for = _build_graph(frame, turned_as, *self._size), key
        self._graph.push(frame)
        return cast(NDArray[np.uint8], cast(VideoFrame, self._graph.pull()).to_ndarray())


@lru_cache(maxsize=1000)
def _warn_of_matrix(path: str, matrix: int, shown_as: str) -> None:
    """Warn once for a file."""
    logger.warning("%s: its colour matrix (%d in H.273) is not supported; shown as %s", path, matrix, shown_as)


def is_mirrored(frame: VideoFrame) -> bool:
    """Return whether a frame is to be shown mirrored, turned or not: its display matrix has a negative determinant."""
    a, b, c, d = _display_matrix(frame)
    return a * d - b * c < 0


def _display_matrix(frame: VideoFrame) -> tuple[float, float, float, float]:
    """Return (a, b, c, d): a point (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        side_data: Any = frame.side_data
    except ValueError:
        # PyAV lists none where there is one kind that it does not know, such as the EXIF data of Motion JPEG.
        side_data = _without_unknown_side_data(frame).side_data
    matrix = side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return 1, 0, 0, 1
    # (a, b, u, c, d, v, x, y, w), 32 bits each.
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    return a, b, c, d


def _without_unknown_side_data(frame: VideoFrame) -> VideoFrame:
    """Return a copy of a frame."""
    graph = Graph()
    filters = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)]
    kinds = cast(Any, SideDataType)
    for kind in range(max(known.value for known in kinds) + 1, _MOST_KINDS_OF_SIDE_DATA):
        filters.append(graph.add("sidedata", f"mode=delete:type={kind}"))
    graph.link_nodes(*filters, graph.add("buffersink")).configure()
    graph.push(frame)
    return cast(VideoFrame, graph.pull())


def _upright_filters(frame: VideoFrame) -> list[tuple[str, str]]:
    """Return the filters that show a frame as its display matrix says: turned, mirrored, or both."""
    a, b, c, d = _display_matrix(frame)
    if abs(b) + abs(c) > abs(a) + abs(d):
        # Columns become rows; the signs say at which end each begins.
        directions = {(False, False): "cclock_flip", (True, False): "clock", (False, True): "cclock"}
        return [("transpose", directions.get((c < 0, b < 0), "clock_flip"))]
    filters = []
    if a < 0:
        filters.append(("hflip", ""))
    if d < 0:
        filters.append(("vflip", ""))
    return filters


def _build_graph(frame: VideoFrame, turned_as: VideoFrame, height: int, width: int) -> Graph:
    """Build the filters for frames like this one, to be turned and mirrored as another one says."""
    graph = Graph()
    if hasattr(graph, "threads"):
        # PyAV 17 on: scaling one frame is over before other threads have woken up.
        graph.threads = 1
    filters = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)]
    for name, arguments in (
        *_upright_filters(turned_as),
        ("scale", f"w={width}:h={height}:flags=bilinear"),
        ("format", "rgb24"),
        ("buffersink", ""),
    ):
        filters.append(graph.add(name, arguments))
    graph.link_nodes(*filters).configure()
    return graph
