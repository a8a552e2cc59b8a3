"""Decode the sound of a video or of a sound file, block by block, so that long files need little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, gcd

import numpy as np
import torch
from av import AudioResampler
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray
from torchaudio.transforms import Resample

from video_llama.errors import MediaError, NoSoundTrackError
from video_llama.processor.containers import demux_packets, open_container, select_stream, translate_errors

__all__ = [
    "Waveform",
    "decode_audio",
    "decode_timed_frames",
    "resample_blocks",
    "resampling_period",
    "select_sound",
    "to_mono",
]

_BLOCK_SECONDS = 10
_MARGIN_SECONDS = 0.1  # far more than the resampling filter reaches to either side
_FULL_SCALE = {torch.int16: 2**15, torch.int32: 2**31}
_PLAUSIBLE_RATES_HZ = range(1_000, 1_000_001)
_MAX_RESAMPLING_PERIOD = 10_000  # the filter's table grows with the period squared


@dataclass(frozen=True)
class Waveform:
    """Sound as samples.

    Attributes:
        samples: (channels, samples), float32, full scale from -1 to 1.
        sample_rate_hz: samples per second.
    """

    samples: torch.Tensor
    sample_rate_hz: int


def decode_audio(path: str | os.PathLike[str], sample_rate_hz: int | None = None, *, mono: bool = False) -> Waveform:
    """Decode the sound track of a video, or a sound file.

    Args:
        path: any format FFmpeg reads. Of several tracks the one a player would choose is taken.
        sample_rate_hz: resample to this rate; None keeps the file's.
        mono: average the channels.

    Raises:
        NoSoundTrackError: the file can be read but has no sound track, or one without a single sample.
        MediaError: the file cannot be read, or its sound track is damaged or cut short.
    """
    with open_container(path) as container:
        stream = select_sound(container, path)
        source_rate_hz = stream.rate
        blocks = _decode_blocks(container, stream, path)
        if mono:
            blocks = (block.mean(dim=0, keepdim=True) for block in blocks)
        if sample_rate_hz is not None and sample_rate_hz != source_rate_hz:
            blocks = resample_blocks(blocks, source_rate_hz, sample_rate_hz)
        collected = list(blocks)
    if not sum(block.shape[-1] for block in collected):
        raise NoSoundTrackError(path, "the sound track is empty")
    samples = torch.cat(collected, dim=-1)
    if not samples.isfinite().all():
        raise MediaError(path, "the sound has samples that are not finite numbers")
    return Waveform(samples, sample_rate_hz or source_rate_hz)


def select_sound(container: InputContainer, path: str | os.PathLike[str]) -> AudioStream:
    """The sound track that a player would choose.

    Raises:
        NoSoundTrackError: there is none.
        MediaError: its header is damaged.
    """
    stream = select_stream(container, path, "audio")
    assert isinstance(stream, AudioStream)
    if stream.rate not in _PLAUSIBLE_RATES_HZ:
        raise MediaError(path, f"a sound track of {stream.rate} samples per second: damaged")
    return stream


def to_mono(samples: torch.Tensor | NDArray[np.generic], sample_rate_hz: int, target_rate_hz: int) -> Waveform:
    """Average the channels of samples in memory and resample them.

    Args:
        samples: (samples,) or (channels, samples), floating point from -1 to 1, or 16 or 32 bit integers.

    Raises:
        MediaError: no samples, more than two dimensions, another type, or values that are not finite.
    """
    values = torch.as_tensor(samples)
    if values.ndim not in (1, 2) or not values.numel():
        raise MediaError("sound", f"samples of shape {tuple(values.shape)}", "give (channels, samples)")
    if not values.is_floating_point() and values.dtype not in _FULL_SCALE:
        raise MediaError("sound", f"samples of type {values.dtype}", "give float32 from -1 to 1")
    channels = values.to(torch.float32).reshape(-1, values.shape[-1])  # (channels, samples)
    mono = channels.mean(dim=0, keepdim=True) / _FULL_SCALE.get(values.dtype, 1)
    if not mono.isfinite().all():
        raise MediaError("sound", "samples that are not finite numbers")
    if sample_rate_hz != target_rate_hz:
        mono = torch.cat(list(resample_blocks([mono], sample_rate_hz, target_rate_hz)), dim=-1)
    return Waveform(mono, target_rate_hz)


def resample_blocks(blocks: Iterable[torch.Tensor], source_rate_hz: int, target_rate_hz: int) -> Iterator[torch.Tensor]:
    """Resample a sound that comes in pieces, as if it were in one piece.

    The windowed-sinc filter looks a few samples around each position, so each piece is filtered together
    with a margin of its neighbours. Pieces are cut where both rates meet on a sample.

    Args:
        blocks: (channels, any number of samples) each, float32.

    Yields:
        (channels, samples) at the target rate.
    """
    source_rate_hz = _round_odd_rate(source_rate_hz, target_rate_hz)
    period, target_period = resampling_period(source_rate_hz, target_rate_hz)
    margin = ceil(_MARGIN_SECONDS * source_rate_hz / period) * period
    # As in the reference, a filter in single precision; more digits would move quiet mel bins by up to 0.05.
    resampler = Resample(source_rate_hz, target_rate_hz, dtype=torch.float32)
    pending: torch.Tensor | None = None
    done = 0  # samples at the head of `pending` that serve as margin only
    for block in blocks:
        pending = block if pending is None else torch.cat([pending, block], dim=-1)
        ready = done + (pending.shape[-1] - done - margin) // period * period
        if ready <= done:
            continue
        resampled = resampler(pending[:, : ready + margin])
        yield resampled[:, done // period * target_period : ready // period * target_period]
        kept_from = max(0, ready - margin)
        pending, done = pending[:, kept_from:], ready - kept_from
    if pending is not None and pending.shape[-1]:
        yield resampler(pending)[:, done // period * target_period :]


def resampling_period(source_rate_hz: int, target_rate_hz: int) -> tuple[int, int]:
    """After how many samples of either rate both meet on a sample."""
    source_rate_hz = _round_odd_rate(source_rate_hz, target_rate_hz)
    common = gcd(source_rate_hz, target_rate_hz)
    return source_rate_hz // common, target_rate_hz // common


def _decode_blocks(
    container: InputContainer, stream: AudioStream, path: str | os.PathLike[str]
) -> Iterator[torch.Tensor]:
    """The whole stream in blocks of about ten seconds: (channels, samples), float32."""
    block_samples = _BLOCK_SECONDS * stream.rate
    frames: list[torch.Tensor] = []
    total = waiting = 0
    for _, samples in decode_timed_frames(container, stream, path):
        frames.append(samples)
        waiting += samples.shape[-1]
        if waiting >= block_samples:
            yield torch.cat(frames, dim=-1)
            total, waiting, frames = total + waiting, 0, []
    if frames:
        yield torch.cat(frames, dim=-1)
    _check_length(container, stream, path, total + waiting)


def decode_timed_frames(
    container: InputContainer, stream: AudioStream, path: str | os.PathLike[str]
) -> Iterator[tuple[float | None, torch.Tensor]]:
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
                    interleaved = torch.from_numpy(converted.to_ndarray())  # (1, samples * channels)
                    yield frame.time, interleaved.view(-1, layout.nb_channels).T


def _check_length(
    container: InputContainer, stream: AudioStream, path: str | os.PathLike[str], num_samples: int
) -> None:
    """FLAC alone states its number of samples and has no outer size that would show a truncation before."""
    declared = stream.duration if container.format.name == "flac" else None
    if declared is not None and num_samples < declared:
        raise MediaError(path, f"the file is truncated: {num_samples} of {declared} samples are there")


def _round_odd_rate(source_rate_hz: int, target_rate_hz: int) -> int:
    """The rate itself; the nearest multiple of 50 Hz for one whose filter fills the memory (44 101 Hz)."""
    if source_rate_hz // gcd(source_rate_hz, target_rate_hz) <= _MAX_RESAMPLING_PERIOD:
        return source_rate_hz
    return max(50, round(source_rate_hz / 50) * 50)
