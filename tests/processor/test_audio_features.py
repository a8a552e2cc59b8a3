"""Log-mel segments; the recorded values are in tests/parity/test_media_parity.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from video_llama.media.sampling import LogMelSettings, segment_ranges
from video_llama.processor.audio_features import log_mel, log_mel_segments

SETTINGS = LogMelSettings(num_mel_frames=60, segment_seconds=0.5)
RATE = SETTINGS.sample_rate_hz


def tone(frequency_hz: float, seconds: float = 0.5) -> Tensor:
    return torch.sin(2 * math.pi * frequency_hz * torch.arange(round(seconds * RATE)) / RATE)


def test_ranges_are_samples_of_one_length_up_to_the_very_end() -> None:
    assert segment_ranges(RATE * 2, 4, "main", SETTINGS) == [(0, 8000), (8000, 16000), (16000, 24000), (24000, 32000)]


def test_ranges_of_a_sound_too_short_for_one_segment_reach_past_its_end() -> None:
    assert segment_ranges(100, 2, "main", SETTINGS) == [(0, 8000), (0, 8000)]


def test_a_higher_tone_lights_up_a_higher_mel_bin() -> None:
    bins = [int(log_mel(tone(frequency), SETTINGS)[:, 20].argmax()) for frequency in (300, 1000, 4000)]
    assert bins == sorted(set(bins))


def test_twice_the_amplitude_is_four_times_the_energy() -> None:
    quiet, loud = log_mel(tone(440), SETTINGS), log_mel(2 * tone(440), SETTINGS)
    brightest = quiet[:, 20].argmax()
    assert float(loud[brightest, 20] - quiet[brightest, 20]) == pytest.approx(math.log(4), abs=1e-3)


def test_frames_that_the_sound_does_not_reach_are_zero_and_too_many_are_cut() -> None:
    mel = log_mel(tone(440, 0.2), SETTINGS)
    assert mel.shape == (SETTINGS.num_mel_bins, SETTINGS.num_mel_frames)
    assert mel[:, 18:].eq(0).all()  # 1 + (200 ms - 25 ms) / 10 ms frames
    assert not mel[:, :18].eq(0).any()
    assert torch.equal(log_mel(tone(440, 2.0), SETTINGS), log_mel(tone(440, 2.0), LogMelSettings())[:, :60])


@pytest.mark.parametrize("num_samples", [1, 399])
def test_less_than_one_window_of_sound_fills_one_frame(num_samples: int) -> None:
    mel = log_mel(torch.linspace(-1, 1, num_samples), SETTINGS)
    assert mel.isfinite().all()
    assert mel[:, 1:].eq(0).all()
    assert not mel[:, 0].eq(0).all()


def test_segments_are_normalised_with_the_settings_mean_and_std() -> None:
    sound = tone(440)
    (values,) = log_mel_segments(sound, [(0, len(sound))], LogMelSettings(num_mel_frames=60, mean=3.0, std=2.0))
    torch.testing.assert_close(values[0], (log_mel(sound - sound.mean(), SETTINGS) - 3) / 2)


def test_a_constant_offset_makes_no_difference() -> None:
    sound, ranges = tone(440), [(0, 8000)]
    torch.testing.assert_close(
        log_mel_segments(sound + 0.3, ranges, SETTINGS), log_mel_segments(sound, ranges, SETTINGS), atol=1e-2, rtol=0
    )


def test_overlapping_segments_leave_the_sound_and_each_other_alone() -> None:
    """The original subtracts each segment's mean from the waveform itself, and so from the segments after it."""
    sound = torch.cat([tone(440) + 0.5, tone(440) - 0.5])
    before, ranges = sound.clone(), [(0, 8000), (4000, 12000), (8000, 16000)]
    values = log_mel_segments(sound, ranges, SETTINGS)
    assert values.shape == (3, 1, SETTINGS.num_mel_bins, SETTINGS.num_mel_frames)
    assert torch.equal(sound, before)
    assert torch.equal(log_mel_segments(sound, ranges[::-1], SETTINGS).flip(0), values)


def test_the_same_range_twice_gives_the_same_segment_twice() -> None:
    values = log_mel_segments(tone(440), [(0, 8000), (0, 8000)], SETTINGS)
    assert torch.equal(values[0], values[1])
