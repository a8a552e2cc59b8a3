"""Decoded audio to log-mel segments as ImageBind's audio trunk wants them (Girdhar et al. 2023, arXiv 2305.05665).

Other audio encoders have their features made by the feature extractor of transformers that belongs to them.

Audio is resampled block by block, so that long files need little memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torchaudio.compliance.kaldi import fbank
from torchaudio.transforms import Resample

from video_llama.errors import ConfigError, MediaError, NoAudioTrackError, translate_foreign
from video_llama.media.audio import RawAudio, decode_blocks, read_part
from video_llama.media.audio_track import open_audio_track
from video_llama.media.sampling import LogMelSettings, resampling_period, round_odd_rate

__all__ = [
    "Waveform",
    "decode_audio",
    "decode_audio_window",
    "extract_features",
    "finish_audio",
    "log_mel",
    "log_mel_segments",
    "resample_blocks",
    "to_mono",
]

# Far more than the resampling filter reaches to either side.
_MARGIN_SECONDS = 0.1
_MAX_SAMPLE = 1e6
# Feature extractors of transformers, by their settings: mel filters take a while to compute.
_EXTRACTORS: dict[str, Any] = {}
_FULL_SCALE = {torch.int16: 2**15, torch.int32: 2**31}


@dataclass(frozen=True)
class Waveform:
    """Audio as samples.

    Attributes:
        samples: (channels, samples), float32, full scale from -1 to 1.
        sample_rate_hz: samples per second.
    """

    samples: torch.Tensor
    sample_rate_hz: int


def decode_audio(path: str | os.PathLike[str], sample_rate_hz: int | None = None, *, mono: bool = False) -> Waveform:
    """Decode the audio track of a video, or an audio file.

    The first sample is played when the first frame of the video is shown. Where the track has nothing, before it
    begins and in its gaps, the audio is silence. (Up to 0.1 s, as that of encoders, is left as it is.)

    Args:
        path: any format FFmpeg reads. Of several tracks the one a player would choose is taken.
        sample_rate_hz: resample to this rate; None keeps the file's.
        mono: average the channels.

    Raises:
        NoAudioTrackError: the file can be read but has no audio track, or one without a single sample.
        MediaError: the file cannot be read, or its audio track is damaged or cut short.
    """
    blocks = []
    with open_audio_track(path) as track:
        rate_hz = track.stream.rate
        for block in decode_blocks(track, mono):
            blocks.append(block)
    return finish_audio(RawAudio(os.fspath(path), blocks, rate_hz), sample_rate_hz or rate_hz)


def decode_audio_window(
    path: str | os.PathLike[str], start_seconds: float, end_seconds: float | None, sample_rate_hz: int
) -> Waveform:
    """Decode the same samples as `decode_audio(path, sample_rate_hz, mono=True)`, but only those of a window.

    Memory and time depend on the length of the window, not on that of the file.

    Args:
        path: any format FFmpeg reads.
        start_seconds, end_seconds: counted from the first sample of `decode_audio`; None is the end of the track.
        sample_rate_hz: resample to this rate.

    Raises:
        NoAudioTrackError: the file has no audio track, or it ends before the window.
        MediaError: the file cannot be read, or its audio track is damaged in the window.
    """
    return finish_audio(read_part(path, start_seconds, end_seconds, sample_rate_hz), sample_rate_hz)


def finish_audio(raw: RawAudio, sample_rate_hz: int) -> Waveform:
    """Resample what was decoded, in this process or in another one.

    Raises:
        NoAudioTrackError: there is not a single sample.
        MediaError: samples that are not finite numbers.
    """
    blocks = list(map(torch.from_numpy, raw.blocks))
    if raw.sample_rate_hz != sample_rate_hz:
        blocks = list(resample_blocks(blocks, raw.sample_rate_hz, sample_rate_hz))
    reason = "the sound track is empty"
    if raw.is_part:
        reason = f"no sound from {raw.start_seconds} seconds on"
    if not blocks:
        raise NoAudioTrackError(raw.source, reason)
    samples = torch.cat(blocks, dim=-1)
    if not samples.isfinite().all():
        raise MediaError(raw.source, "the sound has samples that are not finite numbers")
    # The power of still larger ones would be infinite.
    if samples.numel() and samples.abs().max() > _MAX_SAMPLE:
        reason = f"the sound has samples as large as {samples.abs().max():.1g}, where full scale is 1"
        raise MediaError(raw.source, reason, "it is damaged: copy it again, or scale the samples to -1 to 1")
    # A window is decoded with some audio around it for the resampling filter, which is cut off here.
    samples = samples[:, raw.begin : raw.end]
    if not samples.numel():
        raise NoAudioTrackError(raw.source, reason)
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
    # Integers are averaged as they are and only then scaled to the range from -1 to 1.
    mono = channels.mean(dim=0, keepdim=True) / _FULL_SCALE.get(values.dtype, 1)
    if not mono.isfinite().all():
        raise MediaError("sound", "samples that are not finite numbers")
    if sample_rate_hz != target_rate_hz:
        mono = torch.cat(list(resample_blocks([mono], sample_rate_hz, target_rate_hz)), dim=-1)
    return Waveform(mono, target_rate_hz)


def resample_blocks(blocks: Iterable[torch.Tensor], source_rate_hz: int, target_rate_hz: int) -> Iterator[torch.Tensor]:
    """Resample audio that comes in pieces, as if it were in one piece.

    The windowed-sinc filter looks a few samples around each position, so each piece is filtered together
    with a margin of its neighbours. Pieces are cut where both rates meet on a sample.

    Args:
        blocks: (channels, any number of samples) each, float32.

    Yields:
        (channels, samples) at the target rate.
    """
    source_rate_hz = round_odd_rate(source_rate_hz, target_rate_hz)
    period, target_period = resampling_period(source_rate_hz, target_rate_hz)
    # A period is the shortest time in which both rates have a whole number of samples.
    margin = ceil(_MARGIN_SECONDS * source_rate_hz / period) * period
    # As in the reference, a filter in single precision; more digits would move quiet mel bins by up to 0.05.
    resampler = Resample(source_rate_hz, target_rate_hz, dtype=torch.float32)
    pending: torch.Tensor | None = None
    # Samples at the head of `pending` that serve as margin only.
    done = 0
    for block in blocks:
        pending = block if pending is None else torch.cat([pending, block], dim=-1)
        # `ready` is how far the audio can be completed now: whole periods that leave a margin behind them.
        ready = done + (pending.shape[-1] - done - margin) // period * period
        if ready <= done:
            continue
        # Filter with the margins on both sides, then keep what lies between them.
        resampled = resampler(pending[:, : ready + margin])
        yield resampled[:, done // period * target_period : ready // period * target_period]
        # The next piece needs a margin before it, too.
        kept_from = max(0, ready - margin)
        pending, done = pending[:, kept_from:], ready - kept_from
    # Nothing follows the last piece, so all of the rest is completed.
    if pending is not None and pending.shape[-1]:
        yield resampler(pending)[:, done // period * target_period :]


def log_mel_segments(
    samples: torch.Tensor, ranges: Sequence[tuple[int, int]], settings: LogMelSettings
) -> torch.Tensor:
    """Return the normalised log-mel of some segments of audio.

    The mean is taken from each segment on a copy. (The reference subtracts it in place, so that where
    segments overlap each changes the next.)

    Args:
        samples: (samples,), float32, mono, at `settings.sample_rate_hz`.
        ranges: first sample and one past the last sample of each segment, as `segment_ranges` gives them.

    Returns:
        (segments, 1, mel_bins, mel_frames), float32.
    """
    # In audio that is shorter than a segment all segments are the same.
    mels: dict[tuple[int, int], torch.Tensor] = {}
    for start, stop in ranges:
        if (start, stop) in mels:
            continue
        segment = samples[start:stop]
        if settings.extractor is not None:
            mels[start, stop] = extract_features(segment, settings)
        else:
            mels[start, stop] = log_mel(segment - segment.mean(), settings)
    values = torch.stack(list(map(mels.__getitem__, ranges)))  # (segments, mel_bins, mel_frames)
    if settings.extractor is not None:
        return values.unsqueeze(1)
    return ((values - settings.mean) / settings.std).unsqueeze(1)


def log_mel(samples: torch.Tensor, settings: LogMelSettings) -> torch.Tensor:
    """Return Kaldi's log-mel filter bank of one segment, not normalised.

    Args:
        samples: (samples,), float32, of mean 0. Less than one analysis window is padded with zeros.

    Returns:
        (mel_bins, mel_frames), float32; frames that the sound does not reach are 0, as in training.
    """
    # Kaldi gives no frame for audio that is shorter than one analysis window.
    window = round(settings.frame_length_ms * settings.sample_rate_hz / 1000)
    samples = torch.nn.functional.pad(samples, (0, max(0, window - len(samples))))
    frames = fbank(
        samples.unsqueeze(0),
        htk_compat=True,
        sample_frequency=settings.sample_rate_hz,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=settings.num_mel_bins,
        dither=0.0,
        frame_length=settings.frame_length_ms,
        frame_shift=settings.frame_shift_ms,
    )  # (frames, mel_bins)
    # Every segment gets the same number of frames: a longer one is cut, a shorter one is padded.
    mel = frames.T[:, : settings.num_mel_frames]
    return torch.nn.functional.pad(mel, (0, settings.num_mel_frames - mel.shape[1]))


def extract_features(samples: torch.Tensor, settings: LogMelSettings) -> torch.Tensor:
    """Return what the feature extractor of the settings makes of one segment: two dimensions, float32.

    Args:
        samples: (samples,), float32.

    Raises:
        ConfigError: there is no such feature extractor, or it does not take the segment.
    """
    key = json.dumps(settings.extractor, sort_keys=True)
    if key not in _EXTRACTORS:
        _EXTRACTORS[key] = _build_extractor(settings.extractor or {})
    extractor = _EXTRACTORS[key]
    with translate_foreign(ConfigError, f"the feature extractor {type(extractor).__name__}"):
        features = extractor(samples.numpy(), sampling_rate=settings.sample_rate_hz, return_tensors="pt")
    values: torch.Tensor = next(iter(features.values())).to(torch.float32)
    return values.reshape(values.shape[-2:])


def _build_extractor(values: dict[str, Any]) -> Any:
    """Return a feature extractor of transformers, from its settings."""
    name = str(values.get("feature_extractor_type"))
    kind: Any = getattr(transformers, name, None)
    # The settings may be a stranger's: nothing but a feature extractor is built.
    is_extractor = isinstance(kind, type) and issubclass(kind, transformers.FeatureExtractionMixin)
    if not is_extractor:
        raise ConfigError(f"log_mel.extractor: transformers has no feature extractor {name!r}")
    with translate_foreign(ConfigError, f"log_mel.extractor: the settings of {name}"):
        return kind.from_dict(values)
