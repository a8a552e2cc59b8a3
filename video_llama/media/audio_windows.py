"""Decode parts of a long sound: seek near each, decode a little more than it. Nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from av import FFmpegError
from av.audio.stream import AudioStream
from av.container import InputContainer

from video_llama.media.audio import (
    RawAudio,
    Samples,
    decode_timed_frames,
    resampling_period,
    select_sound,
    to_mono_block,
)
from video_llama.media.containers import open_container

__all__ = ["measure_long_audio", "read_audio_windows"]

_PREROLL_SECONDS = 1.0  # decoders need some packets before what they give is right
_MARGIN_SECONDS = 0.25  # more than the resampling filter reaches to either side
_TAIL_SECONDS = 2.0  # how far before its stated end the real end of a sound is looked for


def read_audio_windows(
    path: str | os.PathLike[str], windows: Sequence[tuple[float, float | None]], sample_rate_hz: int
) -> list[RawAudio]:
    """Parts of a sound, channels averaged, each with a little more on both sides for the resampling.

    Args:
        path: any format FFmpeg reads; it is opened once.
        windows: (start, end) in seconds from the first sample of the track on; None is its end.
        sample_rate_hz: what they are going to be resampled to.

    Raises:
        NoAudioTrackError: the file has no sound track.
        MediaError: the file cannot be read, or its sound track is damaged in a window.
    """
    with open_container(path) as container:
        stream = select_sound(container, path)
        return [_read_window(container, stream, path, start, end, sample_rate_hz) for start, end in windows]


def _read_window(
    container: InputContainer,
    stream: AudioStream,
    path: str | os.PathLike[str],
    start_seconds: float,
    end_seconds: float | None,
    sample_rate_hz: int,
) -> RawAudio:
    rate_hz = stream.rate
    period, target_period = resampling_period(rate_hz, sample_rate_hz)
    first = max(0, int((start_seconds - _MARGIN_SECONDS) * rate_hz) // period * period)
    stop = None if end_seconds is None else round((end_seconds + _MARGIN_SECONDS) * rate_hz)
    samples = _read(container, stream, path, first, stop)
    before = first // period * target_period  # resampled samples up to the first one that is there
    begin = round(start_seconds * sample_rate_hz) - before
    end = None if end_seconds is None else round(end_seconds * sample_rate_hz) - before
    return RawAudio(os.fspath(path), [samples], rate_hz, begin, end, start_seconds)


def measure_long_audio(path: str | os.PathLike[str], sample_rate_hz: int, min_seconds: float) -> int | None:
    """How many samples `decode_audio(path, sample_rate_hz)` would give, found out by decoding the end alone.

    Args:
        path: any format FFmpeg reads.
        sample_rate_hz: resample to this rate.
        min_seconds: shorter sounds are not measured.

    Returns:
        the number of samples; None for a sound that is shorter, or where only decoding all of it would tell.

    Raises:
        NoAudioTrackError: the file has no sound track.
        MediaError: the file cannot be read, or its sound track is damaged at its end.
    """
    with open_container(path) as container:
        stream = select_sound(container, path)
        seconds = _stated_seconds(container, stream)
        if seconds is None or seconds < min_seconds:
            return None
        origin = float((stream.start_time or 0) * (stream.time_base or 0))
        if not _seek(container, stream, origin + seconds - _TAIL_SECONDS):
            return None
        end: int | None = None
        for time, samples in decode_timed_frames(container, stream, path):
            if end is None:
                if time is None or not seconds / 2 < time - origin < seconds:
                    return None  # no times, or the seeking did not lead there
                end = round((time - origin) * stream.rate)
            end += samples.shape[-1]
        if end is None:
            return None
        period, target_period = resampling_period(stream.rate, sample_rate_hz)
        return -(-end * target_period // period)


def _stated_seconds(container: InputContainer, stream: AudioStream) -> float | None:
    """The length that the file claims, of the track or else of the whole."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000


def _read(
    container: InputContainer, stream: AudioStream, path: str | os.PathLike[str], first: int, stop: int | None
) -> Samples:
    """Samples `first` to before `stop` of the track, channels averaged: (1, samples)."""
    pieces: list[Samples] = []
    for position, samples in _decode_from(container, stream, path, first):
        if stop is not None and position >= stop:
            break
        inside = samples[:, max(0, first - position) : None if stop is None else stop - position]
        if inside.size:
            pieces.append(to_mono_block(inside))
    return np.concatenate(pieces, axis=-1) if pieces else np.empty((1, 0), dtype=np.float32)


def _decode_from(
    container: InputContainer, stream: AudioStream, path: str | os.PathLike[str], first: int
) -> Iterator[tuple[int, Samples]]:
    """Frames with the number of their first sample; the first one begins at or before the sample `first`."""
    origin = float((stream.start_time or 0) * (stream.time_base or 0))
    seconds = first / stream.rate - _PREROLL_SECONDS
    if seconds > 0 and _seek(container, stream, origin + seconds):
        position: int | None = None
        for time, samples in decode_timed_frames(container, stream, path):
            if position is None:
                position = first + 1 if time is None else round((time - origin) * stream.rate)
                if position > first:
                    break  # the demuxer went too far, or there are no times
            yield position, samples
            position += samples.shape[-1]
        else:
            return
        _seek(container, stream, origin)
    position = 0
    for _, samples in decode_timed_frames(container, stream, path):
        yield position, samples
        position += samples.shape[-1]


def _seek(container: InputContainer, stream: AudioStream, seconds: float) -> bool:
    try:
        container.seek(round(seconds / float(stream.time_base or 1)), stream=stream)
    except FFmpegError:  # a format that cannot: what is wanted is decoded from the start
        return False
    return True
