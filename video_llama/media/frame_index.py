"""Which frames a video stream has, when they are shown, and where decoding can start for each of them."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from av.packet import Packet

from video_llama.media.mp4_index import FrameTimes

__all__ = ["FrameIndex", "index_frames", "index_times"]

# AVI stores no presentation times and MPEG program streams few: what FFmpeg makes up for them is not
# reliable.
_FORMATS_WITHOUT_TIMES = {"avi", "mpeg"}
_FORMATS_SOUGHT_BY_DECODING_TIME = {"mpegts"}


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


def index_frames(packets: Iterable[Packet], format_name: str) -> FrameIndex:
    """From all packets of a stream in a container of this format."""
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
        return FrameIndex(num_frames, None, {}, rewind_time)
    times.sort()
    keyframes = {bisect.bisect_left(times, shown): seek_time for shown, seek_time in sorted(keyframe_times)}
    return FrameIndex(num_frames, times, keyframes, rewind_time)


def index_times(known: FrameTimes) -> FrameIndex:
    """From the tables of an MP4 file."""
    keyframes = {bisect.bisect_left(known.times, time): time for time in known.keyframe_times}
    return FrameIndex(len(known.times), known.times, keyframes, min(known.first_time, 0))
