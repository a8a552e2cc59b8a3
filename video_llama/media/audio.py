"""Decode the audio of a file, whole or in parts, at the rate of the file; and say which stretches become segments.

A long audio track is not decoded whole: its length is found by decoding its end, and only what becomes a segment is
decoded, with a little more on both sides for the resampling.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from av import AudioResampler, FFmpegError
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from video_llama.errors import MediaError
from video_llama.media.containers import demux_packets, open_container, select_stream, translate_errors
from video_llama.media.samples import PLAUSIBLE_RATES_HZ
from video_llama.media.sampling import SegmentSettings, resampling_period, segment_ranges

__all__ = [
    "RawAudio",
    "RawSegments",
    "Samples",
    "decode_blocks",
    "decode_timed_frames",
    "open_audio_track",
    "read_audio_windows",
    "read_segments",
    "read_window",
]

Path = str | os.PathLike[str]
Samples = NDArray[np.float32]
"""(channels, samples), full scale from -1 to 1."""

LONG_AUDIO_SECONDS = 60.0
"""Of longer audio only the segments are decoded."""

# What is decoded for one segment, and the seeking, takes as long as this.
_SECONDS_FOR_A_SEGMENT = 4.0
_BLOCK_SECONDS = 10
# Decoders need some packets before what they give is right.
_PREROLL_SECONDS = 1.0
# More than the resampling filter reaches to either side.
_MARGIN_SECONDS = 0.25
# How far before its stated end the real end of an audio track is looked for.
_TAIL_SECONDS = 2.0
# In any time base.
_BEFORE_ALL = -(2**40)
# Seeking to the start of these gives the very packets that opening them does, encoder delay included.
_REWINDABLE_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2"}


@dataclass(frozen=True, eq=False)
class RawAudio:
    """Decoded audio that is still to be resampled, channels averaged.

    Attributes:
        source: the file.
        blocks: (1, samples) each, one after the other.
        sample_rate_hz: of the blocks.
        begin, end: what is wanted of the resampled audio, in its samples; `end` None is its end.
        start_seconds: where in the file the wanted part begins.
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


def read_segments(path: Path, settings: SegmentSettings, container: InputContainer | None = None) -> RawSegments:
    """Decode what becomes the segments of an audio track.

    Of a track longer than `LONG_AUDIO_SECONDS` that is only what becomes a segment, where the format can be sought
    in: damage elsewhere stays unnoticed.

    Args:
        path: any format that FFmpeg reads.
        settings: which segments.
        container: the same file, if it is open already.

    Raises:
        NoAudioTrackError: the file has no audio track.
        MediaError: the audio cannot be decoded.
    """
    rate_hz, source = settings.log_mel.sample_rate_hz, os.fspath(path)
    long_seconds = max(LONG_AUDIO_SECONDS, settings.num_segments * _SECONDS_FOR_A_SEGMENT)
    with open_audio_track(path, container) as (opened, stream):
        seconds = None
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif opened.duration is not None:
            seconds = opened.duration / 1_000_000
        if seconds is None or seconds < long_seconds:
            return RawSegments(
                source, [RawAudio(source, list(decode_blocks(opened, stream, path, mono=True)), stream.rate)]
            )
        num_samples = _measure(opened, stream, path, seconds, rate_hz)
        # Measuring has moved on in the file.
        with open_audio_track(path, opened) as (opened, stream):
            if num_samples is None:
                return RawSegments(
                    source, [RawAudio(source, list(decode_blocks(opened, stream, path, mono=True)), stream.rate)]
                )
            audio = []
            for start, stop in segment_ranges(num_samples, settings.num_segments, settings.spacing, settings.log_mel):
                audio.append(_read_part(opened, stream, path, start / rate_hz, stop / rate_hz, rate_hz))
            return RawSegments(source, audio, num_samples)


def read_window(
    path: Path,
    start_seconds: float,
    end_seconds: float | None,
    settings: SegmentSettings,
    container: InputContainer | None = None,
) -> RawSegments:
    """Decode one part of an audio track, whose segments are spread as if it had been cut out.

    Args:
        path: any format that FFmpeg reads.
        start_seconds, end_seconds: from the first sample of the track on; None is its end.
        settings: which segments.
        container: the same file, if it is open already.

    Raises:
        NoAudioTrackError, MediaError: as `read_segments`.
    """
    windows = [(start_seconds, end_seconds)]
    audio = read_audio_windows(path, windows, settings.log_mel.sample_rate_hz, container)
    return RawSegments(os.fspath(path), audio)


def read_audio_windows(
    path: Path,
    windows: Sequence[tuple[float, float | None]],
    sample_rate_hz: int,
    container: InputContainer | None = None,
) -> list[RawAudio]:
    """Decode parts of an audio track, channels averaged, each with a little more on both sides for the resampling.

    Args:
        path: any format that FFmpeg reads.
        windows: (start, end) in seconds from the first sample of the track on; None is its end.
        sample_rate_hz: what they are going to be resampled to.
        container: the same file, if it is open already.

    Raises:
        NoAudioTrackError: the file has no audio track.
        MediaError: the file cannot be read, or its audio track is damaged in a window.
    """
    with open_audio_track(path, container) as (opened, stream):
        return [_read_part(opened, stream, path, start, end, sample_rate_hz) for start, end in windows]


@contextmanager
def open_audio_track(
    path: Path, container: InputContainer | None = None
) -> Iterator[tuple[InputContainer, AudioStream]]:
    """Open the audio track that a player would choose; the container stands at the track's first packet.

    Args:
        path: the file.
        container: the same file, if it is open already: it is used where going back to its start is exact.

    Raises:
        NoAudioTrackError: there is none.
        MediaError: the file cannot be read, or the track's header is damaged.
    """
    if container is not None:
        stream = _select_track(container, path)
        # A file in fragments does not count its frames in the header.
        if container.format.name in _REWINDABLE_FORMATS and stream.frames:
            with translate_errors(path, "the sound track is damaged"):
                container.seek(_BEFORE_ALL, stream=stream)
            yield container, stream
            return
    with open_container(path) as opened:
        yield opened, _select_track(opened, path)


def decode_timed_frames(
    container: InputContainer, stream: AudioStream, path: Path
) -> Iterator[tuple[float | None, Samples]]:
    """Decode the stream from the current position on, in the rate and with the channels of its start.

    Yields:
        when the frame is heard, in seconds of the container's clock, or None if the file does not say; and its
        samples, (channels, samples), float32.
    """
    # PyAV's stream follows the changes that a broadcast may have midway; what is yielded does not.
    rate_hz, layout = stream.rate, None
    converter, converts_from = None, None
    for packet in demux_packets(container, stream, path):
        with translate_errors(path, "the sound track is damaged"):
            for frame in packet.decode():
                assert isinstance(frame, AudioFrame)
                layout = layout or stream.layout
                frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
                if converter is None or frame_format != converts_from:
                    # "flt" interleaves the channels: PyAV crashes on planes from the eighth channel on.
                    converter = AudioResampler(format="flt", layout=layout, rate=rate_hz)
                    converts_from = frame_format
                for converted in converter.resample(frame):
                    interleaved = converted.to_ndarray()  # (1, samples * channels)
                    yield frame.time, interleaved.reshape(-1, layout.nb_channels).T


def decode_blocks(container: InputContainer, stream: AudioStream, path: Path, mono: bool = False) -> Iterator[Samples]:
    """Decode the whole stream in blocks of about ten seconds, with `mono` the average of its channels.

    Raises:
        MediaError: the track is damaged or cut short.
    """
    block_samples = _BLOCK_SECONDS * stream.rate
    frames: list[Samples] = []
    total = waiting = 0
    for _, samples in decode_timed_frames(container, stream, path):
        if mono:
            samples = samples.mean(axis=0, keepdims=True, dtype=np.float32)
        frames.append(samples)
        waiting += samples.shape[-1]
        if waiting >= block_samples:
            yield np.concatenate(frames, axis=-1)
            total += waiting
            waiting = 0
            frames = []
    if frames:
        yield np.concatenate(frames, axis=-1)
    # FLAC alone states its number of samples and has no outer size that would have shown a truncation before.
    if container.format.name == "flac" and stream.duration is not None and total + waiting < stream.duration:
        reason = f"the file is truncated: {total + waiting} of {stream.duration} samples are there"
        raise MediaError(path, reason)


def _select_track(container: InputContainer, path: Path) -> AudioStream:
    stream = cast(AudioStream, select_stream(container, path, "audio"))
    if stream.rate not in PLAUSIBLE_RATES_HZ:
        raise MediaError(path, f"a sound track of {stream.rate} samples per second: damaged")
    return stream


def _read_part(
    container: InputContainer,
    stream: AudioStream,
    path: Path,
    start_seconds: float,
    end_seconds: float | None,
    sample_rate_hz: int,
) -> RawAudio:
    """Decode one part, channels averaged, from and to where both rates meet on a sample."""
    rate_hz = stream.rate
    period, target_period = resampling_period(rate_hz, sample_rate_hz)
    first = max(0, int((start_seconds - _MARGIN_SECONDS) * rate_hz) // period * period)
    # Resampled samples up to the first one that is decoded.
    before = first // period * target_period
    stop, end = None, None
    if end_seconds is not None:
        stop = round((end_seconds + _MARGIN_SECONDS) * rate_hz)
        end = round(end_seconds * sample_rate_hz) - before
    parts = [np.empty((1, 0), dtype=np.float32)]
    for position, samples in _decode_from(container, stream, path, first):
        if stop is not None and position >= stop:
            break
        inside = samples[:, max(0, first - position) :]
        if stop is not None:
            inside = samples[:, max(0, first - position) : stop - position]
        if inside.size:
            parts.append(inside.mean(axis=0, keepdims=True, dtype=np.float32))
    begin = round(start_seconds * sample_rate_hz) - before
    is_part = bool(start_seconds or begin or end is not None)
    return RawAudio(os.fspath(path), [np.concatenate(parts, axis=-1)], rate_hz, begin, end, start_seconds, is_part)


def _measure(
    container: InputContainer, stream: AudioStream, path: Path, seconds: float, sample_rate_hz: int
) -> int | None:
    """Return how many samples the resampled track has, found by decoding its end alone.

    Args:
        container, stream: of the track.
        path: for messages.
        seconds: the length that the file claims.
        sample_rate_hz: rate after resampling.

    Returns:
        the number of samples; None where only decoding all of it would tell.
    """
    origin = float((stream.start_time or 0) * (stream.time_base or 0))
    if not _seek(container, stream, origin + seconds - _TAIL_SECONDS):
        return None
    end: int | None = None
    for time, samples in decode_timed_frames(container, stream, path):
        if end is None:
            # There are no times, or the seeking did not lead near the end.
            if time is None or not seconds / 2 < time - origin < seconds:
                return None
            end = round((time - origin) * stream.rate)
        end += samples.shape[-1]
    if end is None:
        return None
    period, target_period = resampling_period(stream.rate, sample_rate_hz)
    return -(-end * target_period // period)


def _decode_from(
    container: InputContainer, stream: AudioStream, path: Path, first: int
) -> Iterator[tuple[int, Samples]]:
    """Decode frames with the number of their first sample; the first one begins at or before the sample `first`."""
    origin = float((stream.start_time or 0) * (stream.time_base or 0))
    seconds = first / stream.rate - _PREROLL_SECONDS
    if seconds > 0 and _seek(container, stream, origin + seconds):
        position: int | None = None
        for time, samples in decode_timed_frames(container, stream, path):
            if position is None:
                # Without times, or if the demuxer went too far, decoding begins at the start.
                position = first + 1
                if time is not None:
                    position = round((time - origin) * stream.rate)
                if position > first:
                    break
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
    """Seek, or return False in a format that cannot: what is wanted is decoded from the start."""
    try:
        container.seek(round(seconds / float(stream.time_base or 1)), stream=stream)
    except FFmpegError:
        return False
    return True
