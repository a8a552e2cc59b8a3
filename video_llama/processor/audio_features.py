"""Sound to log-mel segments as ImageBind's audio trunk wants them (Girdhar et al. 2023, arXiv 2305.05665)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchaudio.compliance.kaldi import fbank

from video_llama.media.segments import LogMelSettings, segment_ranges

__all__ = ["LogMelSettings", "log_mel", "log_mel_segments", "segment_ranges"]


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
