"""The seven sounds can be told apart, also after they went through a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from examples.tiny_world.world.encoding import write_clip, write_sound
from examples.tiny_world.world.sounds import SAMPLE_RATE_HZ, Sound, draw_sound, random_sound
from examples.tiny_world.world.vocabulary import SOUNDS
from video_llama.processor.audio_features import decode_audio


def sound(kind: str, seed: int = 0, seconds: float = 3.0) -> Sound:
    return random_sound(np.random.default_rng([seed, SOUNDS.index(kind)]), seconds, kind)


def pitch_hz(samples: NDArray[np.float32]) -> float:
    """The strongest frequency."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(spectrum.argmax() * SAMPLE_RATE_HZ / len(samples))


def centroid_hz(samples: NDArray[np.float32]) -> float:
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float((power * np.arange(len(power))).sum() / power.sum() * SAMPLE_RATE_HZ / len(samples))


def tell(samples: NDArray[np.float32]) -> str:
    """Which sound it is, by simple measures."""
    if np.abs(samples).max() < 0.01:
        return "silence"
    levels = [np.abs(block).max() for block in np.array_split(samples[1600:-1600], 60)]
    if min(levels) < 0.1 * max(levels):
        return "beeps"
    power = np.abs(np.fft.rfft(samples[3000:5000])) ** 2
    if np.sort(power)[-50:].sum() < 0.5 * power.sum():
        return "noise"
    early, late = pitch_hz(samples[3000:7000]), pitch_hz(samples[-7000:-3000])
    if late > 1.3 * early:
        return "rising tone"
    if early > 1.3 * late:
        return "falling tone"
    return "low hum" if early < 180 else "whistle" if early > 1500 else "unknown"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", SOUNDS)
def test_each_sound_can_be_told_from_the_sound_track_of_a_clip(kind: str, seed: int, tmp_path: Path) -> None:
    frames = np.zeros((24, 32, 32, 3), dtype=np.uint8)
    write_clip(tmp_path / "clip.mp4", frames, 8, draw_sound(sound(kind, seed)))
    decoded = decode_audio(tmp_path / "clip.mp4", SAMPLE_RATE_HZ).samples[0].numpy()
    assert len(decoded) / SAMPLE_RATE_HZ == pytest.approx(3.0, abs=0.15)
    assert tell(decoded) == kind


@pytest.mark.parametrize("suffix", [".wav", ".m4a"])
@pytest.mark.parametrize("kind", SOUNDS)
def test_each_sound_can_be_told_from_a_file_of_its_own(kind: str, suffix: str, tmp_path: Path) -> None:
    write_sound(tmp_path / f"sound{suffix}", draw_sound(sound(kind)))
    assert tell(decode_audio(tmp_path / f"sound{suffix}", SAMPLE_RATE_HZ).samples[0].numpy()) == kind


@pytest.mark.parametrize(("kind", "sign"), [("rising tone", 1), ("falling tone", -1)])
def test_the_spectral_centroid_goes_the_way_of_the_tone_in_every_part(kind: str, sign: int) -> None:
    parts = np.array_split(draw_sound(sound(kind))[800:-800], 8)
    assert (sign * np.diff([centroid_hz(part) for part in parts]) > 0).all()


def test_a_tone_covers_the_octaves_it_says() -> None:
    tone = Sound("rising tone", 4.0, pitch_hz=200.0, octaves=2.0, tempo_hz=1, phase=0, loudness=0.5, noise_seed=0)
    samples = draw_sound(tone)
    assert pitch_hz(samples[400:2000]) == pytest.approx(200, rel=0.1)
    assert pitch_hz(samples[-2000:-400]) == pytest.approx(800, rel=0.1)


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_waveform_has_its_length_and_loudness_and_no_clicks_at_its_ends(kind: str) -> None:
    drawn = sound(kind, seconds=2.2)
    samples = draw_sound(drawn)
    assert (samples.shape, samples.dtype) == ((35_200,), np.float32)
    assert np.abs(samples).max() <= drawn.loudness
    assert np.abs(samples).max() > (0 if kind == "silence" else 0.7) * drawn.loudness - 1e-6
    assert np.abs(samples[[0, -1]]).max() < 1e-6


def test_two_sounds_of_a_kind_differ_in_more_than_loudness() -> None:
    for kind in SOUNDS[:-1]:
        first, second = (draw_sound(sound(kind, seed)) for seed in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.5, kind


def test_every_kind_comes_when_none_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    assert {random_sound(rng, 2.0).kind for _ in range(100)} == set(SOUNDS)
