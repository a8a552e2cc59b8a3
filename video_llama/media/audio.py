"""The sound track of a file as a decoder gives it: block by block, at the file's rate. Nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd

import numpy as np
from av import AudioResampler
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from video_llama.errors import MediaError
from video_llama.media.containers import demux_packets, open_container, select_stream, translate_errors

__all__ = [
    "RawAudio",
    "Samples",
    "decode_timed_frames",
    "open_audio_track",
    "read_audio_track",
    "resampling_period",
    "select_sound",
]

Samples = NDArray[np.float32]
"""(channels, samples), full scale from -1 to 1."""

_BLOCK_SECONDS = 10
_PLAUSIBLE_RATES_HZ = range(1_000, 1_000_001)
_MAX_RESAMPLING_PERIOD = 10_000  # the filter's table grows with the period squared


@dataclass(frozen=True, eq=False)
class RawAudio:
    """Decoded sound that is still to be resampled, channels averaged.

    Args:
        source: the file.
        blocks: (1, samples) each, one after the other.
        sample_rate_hz: of the blocks.
        begin, end: what is wanted of the resampled sound, in its samples; `end` None is its end.
        start_seconds: where in the file the wanted part begins.
    """

    source: str
    blocks: list[Samples]
    sample_rate_hz: int
    begin: int = 0
    end: int | None = None
    start_seconds: float = 0.0

    @property
    def is_part(self) -> bool:
        """Whether it is cut out of the file."""
        return bool(self.start_seconds or self.begin or self.end is not None)


def read_audio_track(path: str | os.PathLike[str]) -> RawAudio:
    """Decode a whole sound track, channels averaged.

    Raises:
        NoAudioTrackError, MediaError: as `open_audio_track`.
    """
    with open_audio_track(path) as (sample_rate_hz, blocks):
        return RawAudio(os.fspath(path), [to_mono_block(block) for block in blocks], sample_rate_hz)


@contextmanager
def open_audio_track(path: str | os.PathLike[str]) -> Iterator[tuple[int, Iterator[Samples]]]:
    """The rate of a file's sound and its blocks, to be taken while the file is open.

    Raises:
        NoAudioTrackError: the file can be read but has no sound track.
        MediaError: the file cannot be read, or its sound track is damaged or cut short (while blocks are taken).
    """
    with open_container(path) as container:
        stream = select_sound(container, path)
        yield stream.rate, _decode_blocks(container, stream, path)


def to_mono_block(block: Samples) -> Samples:
    """The channels' average: (1, samples), float32."""
    return block.mean(axis=0, keepdims=True, dtype=np.float32)


def select_sound(container: InputContainer, path: str | os.PathLike[str]) -> AudioStream:
    """The sound track that a player would choose.

    Raises:
        NoAudioTrackError: there is none.
        MediaError: its header is damaged.
    """
    stream = select_stream(container, path, "audio")
    assert isinstance(stream, AudioStream)
    if stream.rate not in _PLAUSIBLE_RATES_HZ:
        raise MediaError(path, f"a sound track of {stream.rate} samples per second: damaged")
    return stream


def decode_timed_frames(
    container: InputContainer, stream: AudioStream, path: str | os.PathLike[str]
) -> Iterator[tuple[float | None, Samples]]:
    """The stream from the current position on, frame by frame, in the rate and with the channels of its start.

    Yields:
        when the frame is heard, in seconds of the container's clock, or None if the file does not say; and its
        samples, (channels, samples), float32.
    """
    rate_hz, layout = stream.rate, None  # PyAV's stream follows the changes
    converter, converts_from = None, None
    for packet in demux_packets(container, stream, path):
        with translate_errors(path, "the sound track is damaged"):
            for frame in packet.decode():
                assert isinstance(frame, AudioFrame)
                layout = layout or stream.layout
                frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
                if converter is None or frame_format != converts_from:  # broadcasts change it midway
                    # "flt" interleaves the channels: PyAV crashes on planes from the eighth channel on.
                    converter = AudioResampler(format="flt", layout=layout, rate=rate_hz)
                    converts_from = frame_format
                for converted in converter.resample(frame):
                    interleaved = converted.to_ndarray()  # (1, samples * channels)
                    yield frame.time, interleaved.reshape(-1, layout.nb_channels).T


def resampling_period(source_rate_hz: int, target_rate_hz: int) -> tuple[int, int]:
    """After how many samples of either rate both meet on a sample."""
    source_rate_hz = round_odd_rate(source_rate_hz, target_rate_hz)
    common = gcd(source_rate_hz, target_rate_hz)
    return source_rate_hz // common, target_rate_hz // common


def round_odd_rate(source_rate_hz: int, target_rate_hz: int) -> int:
    """The rate itself; the nearest multiple of 50 Hz for one whose filter fills the memory (44 101 Hz)."""
    if source_rate_hz // gcd(source_rate_hz, target_rate_hz) <= _MAX_RESAMPLING_PERIOD:
        return source_rate_hz
    return max(50, round(source_rate_hz / 50) * 50)


def _decode_blocks(container: InputContainer, stream: AudioStream, path: str | os.PathLike[str]) -> Iterator[Samples]:
    """The whole stream in blocks of about ten seconds."""
    block_samples = _BLOCK_SECONDS * stream.rate
    frames: list[Samples] = []
    total = waiting = 0
    for _, samples in decode_timed_frames(container, stream, path):
        frames.append(samples)
        waiting += samples.shape[-1]
        if waiting >= block_samples:
            yield np.concatenate(frames, axis=-1)
            total, waiting, frames = total + waiting, 0, []
    if frames:
        yield np.concatenate(frames, axis=-1)
    _check_length(container, stream, path, total + waiting)


def _check_length(
    container: InputContainer, stream: AudioStream, path: str | os.PathLike[str], num_samples: int
) -> None:
    """FLAC alone states its number of samples and has no outer size that would show a truncation before."""
    declared = stream.duration if container.format.name == "flac" else None
    if declared is not None and num_samples < declared:
        raise MediaError(path, f"the file is truncated: {num_samples} of {declared} samples are there")
