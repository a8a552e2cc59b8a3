"""The stretches of a sound that become its segments: settings, arithmetic, and the decoding. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from video_llama.constants import AUDIO_SAMPLE_RATE_HZ
from video_llama.media.audio import RawAudio, read_audio_track
from video_llama.media.audio_windows import measure_long_audio, read_audio_windows
from video_llama.media.sampling import SegmentSpacing, sample_segment_starts

__all__ = ["LogMelSettings", "RawSegments", "SegmentSettings", "read_segments", "read_window", "segment_ranges"]

LONG_AUDIO_SECONDS = 60.0
"""Of longer sounds only the segments are decoded."""

_SECONDS_FOR_A_SEGMENT = 4.0  # what is decoded besides it, and the seeking, included


@dataclass(frozen=True)
class LogMelSettings:
    """What a segment of sound becomes; the defaults are what the published weights were trained with.

    Attributes:
        sample_rate_hz: rate that sound is resampled to.
        segment_seconds: length of a segment.
        num_mel_bins: filters of the mel filter bank.
        num_mel_frames: frames of a segment; fewer are padded with zeros, more are cut.
        mean, std: of the training data's log-mel values.
        frame_length_ms, frame_shift_ms: analysis window and its step.
    """

    sample_rate_hz: int = AUDIO_SAMPLE_RATE_HZ
    segment_seconds: float = 2.0
    num_mel_bins: int = 128
    num_mel_frames: int = 204
    mean: float = -4.268
    std: float = 9.138
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0


@dataclass(frozen=True)
class SegmentSettings:
    """Which segments are taken of a sound.

    Attributes:
        num_segments: how many.
        spacing: how they are spread.
        log_mel: their length and rate.
    """

    num_segments: int
    spacing: SegmentSpacing
    log_mel: LogMelSettings = field(default_factory=LogMelSettings)

    def ranges(self, num_samples: int) -> list[tuple[int, int]]:
        """See `segment_ranges`."""
        return segment_ranges(num_samples, self.num_segments, self.spacing, self.log_mel)


@dataclass(frozen=True, eq=False)
class RawSegments:
    """Sound as decoded, still to be resampled, that holds what becomes segments.

    Attributes:
        source: the file.
        sounds: the whole sound, or its segments one by one.
        num_samples: of the whole sound once resampled, if it is not there itself.
    """

    source: str
    sounds: list[RawAudio]
    num_samples: int | None = None


def read_segments(path: str | os.PathLike[str], settings: SegmentSettings) -> RawSegments:
    """Decode what becomes the segments of a sound.

    Of a file longer than `LONG_AUDIO_SECONDS` that is only what becomes a segment, where the format can be sought in:
    damage elsewhere stays unnoticed.

    Raises:
        NoAudioTrackError: the file has no sound.
        MediaError: the sound cannot be decoded.
    """
    rate = settings.log_mel.sample_rate_hz
    long = max(LONG_AUDIO_SECONDS, settings.num_segments * _SECONDS_FOR_A_SEGMENT)
    num_samples = measure_long_audio(path, rate, long)
    if num_samples is None:
        return RawSegments(os.fspath(path), [read_audio_track(path)])
    windows = [(start / rate, stop / rate) for start, stop in settings.ranges(num_samples)]
    return RawSegments(os.fspath(path), read_audio_windows(path, windows, rate), num_samples)


def read_window(
    path: str | os.PathLike[str], start_seconds: float, end_seconds: float | None, settings: SegmentSettings
) -> RawSegments:
    """Decode one part of a sound, whose segments are spread as if it had been cut out.

    Raises:
        NoAudioTrackError, MediaError: as `read_segments`.
    """
    windows = [(start_seconds, end_seconds)]
    return RawSegments(os.fspath(path), read_audio_windows(path, windows, settings.log_mel.sample_rate_hz))


def segment_ranges(
    num_samples: int, num_segments: int, spacing: SegmentSpacing, settings: LogMelSettings
) -> list[tuple[int, int]]:
    """First sample and one past the last sample of each segment; may reach past the end of a short sound."""
    rate = settings.sample_rate_hz
    starts = sample_segment_starts(num_samples / rate, num_segments, settings.segment_seconds, spacing)
    length = round(settings.segment_seconds * rate)
    return [(int(start * rate), int(start * rate) + length) for start in starts]
