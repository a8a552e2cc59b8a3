"""Decode the audio of a file, whole or in parts, at the rate of the file; and say which stretches become segments.

Audio is counted on the clock of the frames: t = 0 is when the first frame of the video is shown, or, in a file without
video, the first sample. Where the track has nothing, before it begins and in its gaps, the audio is silence; what
precedes the first frame is left out.

A long audio track is not decoded whole: its length is found by decoding its end, and only what becomes a segment is
decoded, with a little more on both sides for the resampling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from av import FFmpegError

from video_llama.errors import MediaError
from video_llama.media.audio_track import AudioTrack, OpenedFile, Path, Samples, decode_timed_frames, open_audio_track
from video_llama.media.sampling import (
    SegmentSettings,
    place_on_clock,
    resampling_period,
    segment_ranges,
)

__all__ = [
    "RawAudio",
    "RawSegments",
    "decode_blocks",
    "read_part",
    "read_segments",
    "read_window",
]

LONG_AUDIO_SECONDS = 60.0
"""Of longer audio only the segments are decoded."""

# What is decoded for one segment, and the seeking, takes as long as this.
_SECONDS_FOR_A_SEGMENT = 4.0
_BLOCK_SECONDS = 10
# Decoders need some packets before what they give is right. Where a track has a gap, the demuxer may lead behind it.
_PREROLLS_SECONDS = (1.0, 10.0, 100.0, 1000.0)
# More than the resampling filter reaches to either side.
_MARGIN_SECONDS = 0.25
# How far before its stated end the real end of an audio track is looked for.
_TAIL_SECONDS = 2.0


@dataclass(frozen=True, eq=False)
class RawAudio:
    """Decoded audio that is still to be resampled, channels averaged.

    Attributes:
        source: the file.
        blocks: (1, samples) each, one after the other.
        sample_rate_hz: of the blocks.
        begin, end: what is wanted of the resampled audio, in its samples; `end` None is its end.
        start_seconds: where on the clock the wanted part begins.
        is_part: whether it is cut out of the file.
    """

    source: str
    blocks: list[Samples]
    sample_rate_hz: int
    begin: int = 0
    end: int | None = None
    start_seconds: float = 0.0
    is_part: bool = False


@dataclass(frozen=True, eq=False)
class RawSegments:
    """Audio as decoded, still to be resampled, that holds what becomes segments.

    Attributes:
        source: the file.
        audio: all of it, or its segments one by one.
        num_samples: of the whole audio once resampled, if it is not there itself.
    """

    source: str
    audio: list[RawAudio]
    num_samples: int | None = None

    def of(self, source: str) -> RawSegments:
        """Return the same audio with another name of its source."""
        return replace(self, source=source, audio=[replace(part, source=source) for part in self.audio])


def read_segments(path: Path, settings: SegmentSettings, opened: OpenedFile | None = None) -> RawSegments:
    """Decode what becomes the segments of an audio track.

    Of a track longer than `LONG_AUDIO_SECONDS` that is only what becomes a segment, where the format can be sought
    in: damage elsewhere stays unnoticed.

    Args:
        path: any format that FFmpeg reads.
        settings: which segments.
        opened: the same file, if it is open already.

    Raises:
        NoAudioTrackError: the file has no audio track.
        MediaError: the audio cannot be decoded.
    """
    rate_hz, source = settings.log_mel.sample_rate_hz, os.fspath(path)
    long_seconds = max(LONG_AUDIO_SECONDS, settings.num_segments * _SECONDS_FOR_A_SEGMENT)
    with open_audio_track(path, opened) as track:
        if track.end_seconds < long_seconds:
            return RawSegments(source, [RawAudio(source, list(decode_blocks(track, mono=True)), track.stream.rate)])
        num_samples = _measure(track, rate_hz)
        # Measuring has moved on in the file.
        with open_audio_track(path, track) as track:
            if num_samples is None:
                return RawSegments(source, [RawAudio(source, list(decode_blocks(track, mono=True)), track.stream.rate)])
            audio = []
            for start, stop in segment_ranges(num_samples, settings.num_segments, settings.spacing, settings.log_mel):
                audio.append(_read_part(track, start / rate_hz, stop / rate_hz, rate_hz))
            return RawSegments(source, audio, num_samples)


def read_window(
    path: Path,
    start_seconds: float,
    end_seconds: float | None,
    settings: SegmentSettings,
    opened: OpenedFile | None = None,
) -> RawSegments:
    """Decode one part of an audio track, whose segments are spread as if it had been cut out.

    Args:
        path: any format that FFmpeg reads.
        start_seconds, end_seconds: on the clock of the frames; None is the end of the track.
        settings: which segments.
        opened: the same file, if it is open already.

    Raises:
        NoAudioTrackError, MediaError: as `read_segments`.
    """
    audio = read_part(path, start_seconds, end_seconds, settings.log_mel.sample_rate_hz, opened)
    return RawSegments(os.fspath(path), [audio])


def read_part(
    path: Path,
    start_seconds: float,
    end_seconds: float | None,
    sample_rate_hz: int,
    opened: OpenedFile | None = None,
) -> RawAudio:
    """Decode a part of an audio track, channels averaged, with a little more on both sides for the resampling.

    Args:
        path: any format that FFmpeg reads.
        start_seconds, end_seconds: on the clock of the frames; None is the end of the track.
        sample_rate_hz: what it is going to be resampled to.
        opened: the same file, if it is open already.

    Raises:
        NoAudioTrackError: the file has no audio track.
        MediaError: the file cannot be read, or its audio track is damaged in the part.
    """
    with open_audio_track(path, opened) as track:
        return _read_part(track, start_seconds, end_seconds, sample_rate_hz)


def decode_blocks(track: AudioTrack, mono: bool = False) -> Iterator[Samples]:
    """Decode the track from t = 0 on in blocks of about ten seconds, with `mono` the average of its channels.

    Raises:
        MediaError: the track is damaged or cut short.
    """
    block_samples = _BLOCK_SECONDS * track.stream.rate
    frames: list[Samples] = []
    end = waiting = 0
    for position, samples in place_on_clock(decode_timed_frames(track), 0, track.stream.rate, track.zero_seconds):
        end = position + samples.shape[-1]
        if end <= 0:
            continue
        samples = samples[:, max(0, -position) :]
        if mono:
            samples = samples.mean(axis=0, keepdims=True, dtype=np.float32)
        frames.append(samples)
        waiting += samples.shape[-1]
        if waiting >= block_samples:
            yield np.concatenate(frames, axis=-1)
            waiting = 0
            frames = []
    if frames:
        yield np.concatenate(frames, axis=-1)
    # FLAC alone states its number of samples and has no outer size that would have shown a truncation before.
    stated = track.stream.duration
    if track.container.format.name == "flac" and stated is not None and end < stated:
        raise MediaError(track.path, f"the file is truncated: {end} of {stated} samples are there")


def _read_part(track: AudioTrack, start_seconds: float, end_seconds: float | None, sample_rate_hz: int) -> RawAudio:
    """Decode one part, channels averaged, from and to where both rates meet on a sample."""
    rate_hz = track.stream.rate
    period, target_period = resampling_period(rate_hz, sample_rate_hz)
    first = max(0, int((start_seconds - _MARGIN_SECONDS) * rate_hz) // period * period)
    # Resampled samples up to the first one that is decoded.
    before = first // period * target_period
    stop, end = None, None
    if end_seconds is not None:
        stop = round((end_seconds + _MARGIN_SECONDS) * rate_hz)
        end = round(end_seconds * sample_rate_hz) - before
    parts = [np.empty((1, 0), dtype=np.float32)]
    for position, samples in _decode_from(track, first):
        if stop is not None and position >= stop:
            break
        inside = samples[:, max(0, first - position) :]
        if stop is not None:
            inside = samples[:, max(0, first - position) : stop - position]
        if inside.size:
            parts.append(inside.mean(axis=0, keepdims=True, dtype=np.float32))
    begin = round(start_seconds * sample_rate_hz) - before
    is_part = bool(start_seconds or begin or end is not None)
    blocks = [np.concatenate(parts, axis=-1)]
    return RawAudio(os.fspath(track.path), blocks, rate_hz, begin, end, start_seconds, is_part)


def _measure(track: AudioTrack, sample_rate_hz: int) -> int | None:
    """Return how many samples the track has from t = 0 on at another rate, found by decoding its end alone.

    Returns:
        the number of samples; None where only decoding all of it would tell.
    """
    rate_hz, stated = track.stream.rate, track.end_seconds
    if not _seek(track, stated - _TAIL_SECONDS):
        return None
    frames = decode_timed_frames(track, is_after_seek=True)
    first = list(islice(frames, 1))
    # There are no times, or the seeking did not lead near the end.
    if not first or first[0][0] is None or not stated / 2 < first[0][0] - track.zero_seconds < stated:
        return None
    end = round((first[0][0] - track.zero_seconds) * rate_hz)
    for position, samples in place_on_clock(chain(first, frames), end, rate_hz, track.zero_seconds):
        end = position + samples.shape[-1]
    period, target_period = resampling_period(rate_hz, sample_rate_hz)
    return -(-end * target_period // period)


def _decode_from(track: AudioTrack, first: int) -> Iterator[tuple[int, Samples]]:
    """Decode frames with the number of their first sample; the first one begins at or before the sample `first`."""
    rate_hz, begin = track.stream.rate, track.begin_seconds - track.zero_seconds
    for preroll in _PREROLLS_SECONDS:
        target = first / rate_hz - preroll
        if target <= begin or not _seek(track, target):
            break
        frames = decode_timed_frames(track, is_after_seek=True)
        opening = list(islice(frames, 1))
        if not opening:
            return
        time = opening[0][0]
        if time is None:
            break
        position = round((time - track.zero_seconds) * rate_hz)
        if position <= first:
            yield from place_on_clock(chain(opening, frames), position, rate_hz, track.zero_seconds)
            return
    # Without times, or if the demuxer goes too far, decoding begins at the start, where a new track stands already.
    if first / rate_hz - _PREROLLS_SECONDS[0] > begin:
        _seek(track, begin)
    yield from place_on_clock(decode_timed_frames(track), 0, rate_hz, track.zero_seconds)


def _seek(track: AudioTrack, seconds: float) -> bool:
    """Seek to a time from t = 0 on, or return False in a file that cannot: it is decoded from the start."""
    if track.clock_jumps:
        return False
    try:
        seconds += track.zero_seconds
        track.container.seek(round(seconds / float(track.stream.time_base or 1)), stream=track.stream)
    except FFmpegError:
        return False
    return True
