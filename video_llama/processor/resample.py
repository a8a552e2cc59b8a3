"""Sound as the model wants it, in one rate: of a file, of a part of one, or from memory.

Files are decoded and resampled block by block, so that long ones need little memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.transforms import Resample

from video_llama.errors import MediaError, NoAudioTrackError
from video_llama.media.audio import (
    RawAudio,
    Samples,
    open_audio_track,
    resampling_period,
    round_odd_rate,
    to_mono_block,
)
from video_llama.media.audio_windows import read_audio_windows

__all__ = ["Waveform", "decode_audio", "decode_audio_window", "finish_audio", "resample_blocks", "to_mono"]

_MARGIN_SECONDS = 0.1  # far more than the resampling filter reaches to either side
_FULL_SCALE = {torch.int16: 2**15, torch.int32: 2**31}


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
        NoAudioTrackError: the file can be read but has no sound track, or one without a single sample.
        MediaError: the file cannot be read, or its sound track is damaged or cut short.
    """
    with open_audio_track(path) as (source_rate_hz, blocks):
        if mono:
            blocks = map(to_mono_block, blocks)
        collected = list(_resampled(blocks, source_rate_hz, sample_rate_hz or source_rate_hz))
    return _whole(path, collected, sample_rate_hz or source_rate_hz, "the sound track is empty")


def decode_audio_window(
    path: str | os.PathLike[str], start_seconds: float, end_seconds: float | None, sample_rate_hz: int
) -> Waveform:
    """The same samples as in `decode_audio(path, sample_rate_hz, mono=True)`, but only those of a window.

    Memory and time depend on the length of the window, not on that of the file.

    Args:
        path: any format FFmpeg reads.
        start_seconds, end_seconds: from the first sample of the track on; None is its end.
        sample_rate_hz: resample to this rate.

    Raises:
        NoAudioTrackError: the file has no sound track, or it ends before the window.
        MediaError: the file cannot be read, or its sound track is damaged in the window.
    """
    [raw] = read_audio_windows(path, [(start_seconds, end_seconds)], sample_rate_hz)
    return finish_audio(raw, sample_rate_hz)


def finish_audio(raw: RawAudio, sample_rate_hz: int) -> Waveform:
    """Resample what another process has decoded, with the samples that `decode_audio` would have given.

    Raises:
        NoAudioTrackError: there is not a single sample.
        MediaError: samples that are not finite numbers.
    """
    resampled = list(_resampled(raw.blocks, raw.sample_rate_hz, sample_rate_hz))
    nothing = f"no sound from {raw.start_seconds} seconds on" if raw.is_part else "the sound track is empty"
    whole = _whole(raw.source, resampled, sample_rate_hz, nothing)
    if not raw.is_part:
        return whole
    samples = whole.samples[:, raw.begin : raw.end]
    if not samples.numel():
        raise NoAudioTrackError(raw.source, nothing)
    return Waveform(samples, sample_rate_hz)


def _resampled(blocks: Iterable[Samples], source_rate_hz: int, target_rate_hz: int) -> Iterator[torch.Tensor]:
    tensors = (torch.from_numpy(block) for block in blocks)
    return tensors if source_rate_hz == target_rate_hz else resample_blocks(tensors, source_rate_hz, target_rate_hz)


def _whole(path: str | os.PathLike[str], blocks: list[torch.Tensor], sample_rate_hz: int, nothing: str) -> Waveform:
    if not sum(block.shape[-1] for block in blocks):
        raise NoAudioTrackError(path, nothing)
    samples = torch.cat(blocks, dim=-1)
    if not samples.isfinite().all():
        raise MediaError(path, "the sound has samples that are not finite numbers")
    return Waveform(samples, sample_rate_hz)


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
    source_rate_hz = round_odd_rate(source_rate_hz, target_rate_hz)
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
