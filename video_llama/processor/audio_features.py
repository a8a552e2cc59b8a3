"""Sound to log-mel segments as ImageBind's audio trunk wants them (Girdhar et al. 2023, arXiv 2305.05665)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchaudio.compliance.kaldi import fbank

from video_llama.constants import AUDIO_SAMPLE_RATE_HZ
from video_llama.processor.sampling import SegmentSpacing, sample_segment_starts

__all__ = ["LogMelSettings", "log_mel", "log_mel_segments", "segment_ranges"]


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


def segment_ranges(
    num_samples: int, num_segments: int, spacing: SegmentSpacing, settings: LogMelSettings
) -> list[tuple[int, int]]:
    """First sample and one past the last sample of each segment; may reach past the end of a short sound."""
    rate = settings.sample_rate_hz
    starts = sample_segment_starts(num_samples / rate, num_segments, settings.segment_seconds, spacing)
    length = round(settings.segment_seconds * rate)
    return [(int(start * rate), int(start * rate) + length) for start in starts]


def log_mel_segments(
    samples: torch.Tensor, ranges: Sequence[tuple[int, int]], settings: LogMelSettings
) -> torch.Tensor:
    """Normalised log-mel of some segments of a sound.

    The mean is taken from each segment on a copy. (The reference subtracts it in place, so that where
    segments overlap each changes the next.)

    Args:
        samples: (samples,), float32, mono, at `settings.sample_rate_hz`.
        ranges: first sample and one past the last sample of each segment, as `segment_ranges` gives them.

    Returns:
        (segments, 1, mel_bins, mel_frames), float32.
    """
    mels: dict[tuple[int, int], torch.Tensor] = {}  # in a sound shorter than a segment all are the same
    for start, stop in ranges:
        if (start, stop) not in mels:
            segment = samples[start:stop]
            mels[start, stop] = log_mel(segment - segment.mean(), settings)
    values = torch.stack([mels[bounds] for bounds in ranges])  # (segments, mel_bins, mel_frames)
    return ((values - settings.mean) / settings.std).unsqueeze(1)


def log_mel(samples: torch.Tensor, settings: LogMelSettings) -> torch.Tensor:
    """Kaldi's log-mel filter bank of one segment, not normalised.

    Args:
        samples: (samples,), float32, of mean 0. Less than one analysis window is padded with zeros.

    Returns:
        (mel_bins, mel_frames), float32; frames that the sound does not reach are 0, as in training.
    """
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
    mel = frames.T[:, : settings.num_mel_frames]
    return torch.nn.functional.pad(mel, (0, settings.num_mel_frames - mel.shape[1]))
