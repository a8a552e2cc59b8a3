"""Which frames and which stretches of sound are looked at: arithmetic on counts and seconds only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

__all__ = [
    "SegmentSpacing",
    "frame_times_message",
    "frame_window",
    "sample_headtail_indices",
    "sample_segment_starts",
    "sample_uniform_indices",
]

SegmentSpacing = Literal["main", "pv015"]
"""How segments are spread over a sound: to its very end, or short of it as pytorchvideo 0.1.5 did."""


def sample_uniform_indices(num_source_frames: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames at equal steps from the first one on, or of all frames if there are
    fewer.

    The step is a double and each index is cut off, not rounded: the indices that the published models were
        trained with depend on it.

    Raises:
        ValueError: a count below 1.
    """
    _check_counts(num_source_frames, num_frames)
    count = min(num_frames, num_source_frames)
    step = num_source_frames / count
    return [min(int(position * step), num_source_frames - 1) for position in range(count)]


def sample_headtail_indices(num_source_frames: int, num_frames: int, rng: random.Random) -> list[int]:
    """Random ascending indices for training, half from each half of the video; always as many as asked.

    Where a half holds fewer frames than are wanted of it, frames repeat.

    Raises:
        ValueError: a count below 1.
    """
    _check_counts(num_source_frames, num_frames)
    middle = num_source_frames // 2
    head_count = num_frames // 2 if middle else 0  # a one-frame video has no head
    head = _draw(range(middle), head_count, rng)
    return head + _draw(range(middle, num_source_frames), num_frames - head_count, rng)


def frame_window(
    num_source_frames: int, fps: float, start_seconds: float | None, end_seconds: float | None
) -> tuple[int, int]:
    """First index and one past the last index of the frames shown from `start_seconds` to before
    `end_seconds`.

    A window shorter than a frame holds the one frame that is on the screen at its start.

    Raises:
        ValueError: the window is empty, or begins before the video or after its end.
    """
    start = 0.0 if start_seconds is None else start_seconds
    if start < 0 or (end_seconds is not None and end_seconds <= start):
        raise ValueError(f"no time between {start} and {end_seconds} seconds")
    first = int(start * fps)
    if first >= num_source_frames:
        raise ValueError(f"the video ends after {num_source_frames / fps:.2f} seconds, before {start} seconds")
    stop = num_source_frames if end_seconds is None else min(num_source_frames, round(end_seconds * fps))
    return first, max(first + 1, stop)


def frame_times_message(times_seconds: Sequence[float]) -> str:
    """The sentence that tells the language model when the frames were taken; "" if there are no times."""
    if not times_seconds:
        return ""
    times = ", ".join(str(round(time, 1)) for time in times_seconds)
    return f"The video contains {len(times_seconds)} frames sampled at {times} seconds. "


def sample_segment_starts(
    duration_seconds: float, num_segments: int, segment_seconds: float, spacing: SegmentSpacing
) -> list[Fraction]:
    """Start times, in seconds, of segments at equal steps over a sound; all 0 if it is no longer than one
    segment.

    Exact fractions of the last possible start (itself a double, as in pytorchvideo), so that turning them
    into sample positions cannot be one off.

    Raises:
        ValueError: `num_segments` below 1 or an unknown spacing.
    """
    if num_segments < 1:
        raise ValueError(f"num_segments must be at least 1, not {num_segments}")
    if spacing not in ("main", "pv015"):
        raise ValueError(f"unknown segment spacing {spacing!r}: choose 'main' or 'pv015'")
    last_start = Fraction(max(duration_seconds - segment_seconds, 0.0))
    steps = max(num_segments - 1, 1) if spacing == "main" else num_segments
    return [last_start * position / steps for position in range(num_segments)]


def _draw(population: range, count: int, rng: random.Random) -> list[int]:
    """`count` ascending draws, without repeats as long as the population lasts."""
    rounds, rest = divmod(count, len(population)) if count else (0, 0)
    return sorted([*population] * rounds + rng.sample(population, rest))


def _check_counts(num_source_frames: int, num_frames: int) -> None:
    if num_source_frames < 1 or num_frames < 1:
        raise ValueError(f"cannot sample {num_frames} of {num_source_frames} frames: both must be at least 1")
