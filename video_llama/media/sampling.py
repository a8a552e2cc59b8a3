"""Which frames and which stretches of sound are looked at: arithmetic on counts and seconds only."""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from video_llama.constants import AUDIO_SAMPLE_RATE_HZ
from video_llama.errors import ConfigError

__all__ = [
    "CLOCK_TOLERANCE_SECONDS",
    "LogMelSettings",
    "SegmentSettings",
    "SegmentSpacing",
    "frame_seconds",
    "frame_times_message",
    "frame_window",
    "place_on_clock",
    "resampling_period",
    "round_odd_rate",
    "sample_headtail_indices",
    "sample_segment_starts",
    "sample_uniform_indices",
    "segment_ranges",
]

SegmentSpacing = Literal["main", "pv015"]
"""How segments are spread over audio: to its very end, or short of it as pytorchvideo 0.1.5 did."""

# The resampling filter's table grows with the period squared.
_MAX_RESAMPLING_PERIOD = 10_000

CLOCK_TOLERANCE_SECONDS = 0.1
"""Where the times of audio differ from the count of its samples by less, the count is kept, as by FFmpeg's own
correction (the filter aresample): encoders begin with some samples of their own, and containers round times."""

# A longer gap is a damaged time.
_LONGEST_GAP_SECONDS = 6 * 3600.0

# A multiple of a window's length is not exactly the time of the frame that begins there.
_ROUNDING_SECONDS = 1e-6


@dataclass(frozen=True)
class LogMelSettings:
    """What a segment of audio becomes; the defaults are what the published weights were trained with.

    Attributes:
        sample_rate_hz: rate that audio is resampled to.
        segment_seconds: length of a segment.
        num_mel_bins: filters of the mel filter bank.
        num_mel_frames: frames of a segment; fewer are padded with zeros, more are cut.
        mean, std: of the training data's log-mel values.
        frame_length_ms, frame_shift_ms: analysis window and its step.
        extractor: settings of a feature extractor of transformers, which then makes the features, and not Kaldi's
            filter bank; the numbers of bins and frames are the two sizes of what it returns.

    Raises:
        ConfigError: a setting that is no number, or not above 0.
    """

    sample_rate_hz: int = AUDIO_SAMPLE_RATE_HZ
    segment_seconds: float = 2.0
    num_mel_bins: int = 128
    num_mel_frames: int = 204
    mean: float = -4.268
    std: float = 9.138
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    extractor: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        settings: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "extractor"}
        for name, value in settings.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if not is_number or (value <= 0 and name != "mean"):
                raise ConfigError(f"log_mel.{name} must be a number above 0, not {value!r}")
            if name in ("sample_rate_hz", "num_mel_bins", "num_mel_frames") and not isinstance(value, int):
                raise ConfigError(f"log_mel.{name} must be a whole number, not {value!r}")


@dataclass(frozen=True)
class SegmentSettings:
    """Which segments are taken of an audio track.

    Attributes:
        num_segments: how many.
        spacing: how they are spread.
        log_mel: their length and rate.
    """

    num_segments: int
    spacing: SegmentSpacing
    log_mel: LogMelSettings = field(default_factory=LogMelSettings)


def sample_uniform_indices(num_source_frames: int, num_frames: int) -> list[int]:
    """Indices of `num_frames` frames at equal steps from the first one on, or of all frames if there are
    fewer.

    The step is a double and each index is cut off, not rounded: the indices that the published models were
        trained with depend on it.

    Raises:
        ValueError: a count below 1.
    """
    if min(num_source_frames, num_frames) < 1:
        raise _bad_counts(num_source_frames, num_frames)
    count = min(num_frames, num_source_frames)
    step = num_source_frames / count
    indices = []
    for position in range(count):
        indices.append(min(int(position * step), num_source_frames - 1))
    return indices


def sample_headtail_indices(num_source_frames: int, num_frames: int, rng: random.Random) -> list[int]:
    """Random ascending indices for training, half from each half of the video; always as many as asked.

    Where a half holds fewer frames than are wanted of it, frames repeat.

    Raises:
        ValueError: a count below 1.
    """
    if min(num_source_frames, num_frames) < 1:
        raise _bad_counts(num_source_frames, num_frames)
    middle = num_source_frames // 2
    # A one-frame video has no head.
    head_count = num_frames // 2 if middle else 0
    head = _draw(range(middle), head_count, rng)
    return head + _draw(range(middle, num_source_frames), num_frames - head_count, rng)


def frame_seconds(
    stated_seconds: Sequence[float] | NDArray[np.float64], last_seconds: float, fps: float, tolerance_seconds: float
) -> tuple[list[float], float]:
    """Return when each frame is shown, counted from the first one, and when the last one ends.

    Args:
        stated_seconds: ascending times of the frames on any clock, as the file states them.
        last_seconds: how long the last frame is shown; 0 where the file does not say.
        fps: average frames per second that the file states.
        tolerance_seconds: what the file may have rounded its times by. Times no further than that from index / fps are
            those of a constant rate, and become index / fps: what the prompts of the published models said.
    """
    count = len(stated_seconds)
    counted = np.arange(count) / fps
    stated = np.asarray(stated_seconds, dtype=np.float64)
    stated = stated - stated[0]
    # All frames at the same time: the file does not say.
    if not stated[-1] or np.abs(stated - counted).max() <= tolerance_seconds:
        return counted.tolist(), count / fps
    return stated.tolist(), float(stated[-1]) + (last_seconds or 1 / fps)


def frame_window(
    times_seconds: Sequence[float], duration_seconds: float, start_seconds: float | None, end_seconds: float | None
) -> tuple[int, int]:
    """First index and one past the last index of the frames shown from `start_seconds` to before
    `end_seconds`.

    A window shorter than a frame holds the one frame that is on the screen at its start.

    Args:
        times_seconds: when each frame of the video appears, from 0 on.
        duration_seconds: when the last one goes.
        start_seconds, end_seconds: of the window; None is the start or the end of the video.

    Raises:
        ValueError: the window is empty, or begins before the video or after its end.
    """
    start = start_seconds or 0.0
    if start < 0 or (end_seconds is not None and end_seconds <= start):
        raise ValueError(f"no time between {start} and {end_seconds} seconds")
    if start >= duration_seconds:
        raise ValueError(f"the video ends after {duration_seconds:.2f} seconds, before {start} seconds")
    first = bisect.bisect_right(times_seconds, start + _ROUNDING_SECONDS) - 1
    stop = len(times_seconds)
    if end_seconds is not None:
        stop = bisect.bisect_left(times_seconds, end_seconds - _ROUNDING_SECONDS)
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
    steps = num_segments
    if spacing == "main":
        steps = max(num_segments - 1, 1)
    starts = []
    for position in range(num_segments):
        starts.append(last_start * position / steps)
    return starts


def segment_ranges(
    num_samples: int, num_segments: int, spacing: SegmentSpacing, settings: LogMelSettings
) -> list[tuple[int, int]]:
    """Return first sample and one past the last sample of each segment; may reach past the end of short audio."""
    rate_hz, seconds = settings.sample_rate_hz, settings.segment_seconds
    length = round(seconds * rate_hz)
    ranges = []
    for start in sample_segment_starts(num_samples / rate_hz, num_segments, seconds, spacing):
        first = int(start * rate_hz)
        ranges.append((first, first + length))
    return ranges


def place_on_clock(
    frames: Iterable[tuple[float | None, NDArray[np.float32]]], position: int, rate_hz: int, zero_seconds: float
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Number frames of audio by their first sample, counted from t = 0, with silence where there are none.

    Args:
        frames: when each one begins, in seconds of the file's clock or None if the file does not say; and its samples,
            (channels, samples).
        position: of the first one, unless its time says otherwise.
        rate_hz: samples per second.
        zero_seconds: what the file's clock shows at t = 0.

    Yields:
        the number of the first sample, below 0 for what precedes t = 0; and the samples.
    """
    tolerance, longest = round(CLOCK_TOLERANCE_SECONDS * rate_hz), round(_LONGEST_GAP_SECONDS * rate_hz)
    is_first = True
    for seconds, samples in frames:
        gap = 0
        if seconds is not None:
            gap = round((seconds - zero_seconds) * rate_hz) - position
        if tolerance <= gap <= longest:
            for start in range(0, gap, rate_hz):
                yield position + start, np.zeros((len(samples), min(rate_hz, gap - start)), dtype=np.float32)
            position += gap
        elif is_first and gap <= -tolerance:
            position += gap
        elif abs(gap) >= tolerance:
            # The clock itself jumps, as in two recordings put together.
            zero_seconds += gap / rate_hz
        yield position, samples
        position += samples.shape[-1]
        is_first = False


def resampling_period(source_rate_hz: int, target_rate_hz: int) -> tuple[int, int]:
    """Return after how many samples of either rate both meet on a sample."""
    source_rate_hz = round_odd_rate(source_rate_hz, target_rate_hz)
    common = math.gcd(source_rate_hz, target_rate_hz)
    return source_rate_hz // common, target_rate_hz // common


def round_odd_rate(source_rate_hz: int, target_rate_hz: int) -> int:
    """Return the rate, or the nearest multiple of 50 Hz for one whose filter would fill the memory (44 101 Hz)."""
    if source_rate_hz // math.gcd(source_rate_hz, target_rate_hz) <= _MAX_RESAMPLING_PERIOD:
        return source_rate_hz
    return max(50, round(source_rate_hz / 50) * 50)


def _draw(population: range, count: int, rng: random.Random) -> list[int]:
    """`count` ascending draws, without repeats as long as the population lasts."""
    rounds, rest = divmod(count, len(population)) if count else (0, 0)
    return sorted([*population] * rounds + rng.sample(population, rest))


def _bad_counts(num_source_frames: int, num_frames: int) -> ValueError:
    return ValueError(f"cannot sample {num_frames} of {num_source_frames} frames: both must be at least 1")
