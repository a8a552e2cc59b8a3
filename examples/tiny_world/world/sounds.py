"""The seven sounds as waveforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from examples.tiny_world.world.vocabulary import SOUNDS

__all__ = ["SAMPLE_RATE_HZ", "Sound", "draw_sound", "random_sound"]

SAMPLE_RATE_HZ = 16_000


@dataclass(frozen=True)
class Sound:
    """One sound.

    Attributes:
        kind: word of `SOUNDS`.
        seconds: length.
        pitch_hz: of a tone; the lowest of a rising or falling one.
        octaves: range of a rising or falling tone.
        tempo_hz: beeps per second.
        phase: start of the first beep, from 0 to 1.
        loudness: amplitude, full scale is 1.
        noise_seed: of the noise.
    """

    kind: str
    seconds: float
    pitch_hz: float
    octaves: float
    tempo_hz: float
    phase: float
    loudness: float
    noise_seed: int


_PITCH_RANGES_HZ = {
    "rising tone": (180.0, 450.0),
    "falling tone": (180.0, 450.0),
    "beeps": (600.0, 1200.0),
    "low hum": (70.0, 150.0),
    "whistle": (1600.0, 3000.0),
}


def random_sound(rng: Generator, seconds: float, kind: str | None = None) -> Sound:
    """Draw a sound of a given length, of any kind or of a given one."""
    kind = str(rng.choice(SOUNDS)) if kind is None else kind
    low, high = _PITCH_RANGES_HZ.get(kind, (440.0, 440.0))
    return Sound(
        kind=kind,
        seconds=seconds,
        pitch_hz=float(low * (high / low) ** rng.random()),
        octaves=float(rng.uniform(1.8, 3.0)),
        tempo_hz=float(rng.uniform(2.0, 4.5)),
        phase=float(rng.random()),
        loudness=float(rng.uniform(0.15, 0.6)),
        noise_seed=int(rng.integers(2**32)),
    )


def draw_sound(sound: Sound) -> NDArray[np.float32]:
    """Return (samples,), float32 from -1 to 1, at `SAMPLE_RATE_HZ`.

    Raises:
        KeyError: a kind that is not in `SOUNDS`.
    """
    time = np.arange(round(sound.seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = sound.loudness * _DRAW[sound.kind](sound, time)
    # No click at either end.
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.02)
    return (wave * fade).astype(np.float32)


def _sweep(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a tone of exponentially rising pitch; its phase is the integral of the pitch."""
    octaves = sound.octaves * time / sound.seconds
    cycles = sound.pitch_hz * sound.seconds / (sound.octaves * np.log(2)) * 2**octaves
    return _timbre(cycles)


def _timbre(cycles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a tone with two soft overtones, from the number of cycles since the start."""
    return (np.sin(2 * np.pi * cycles) + 0.3 * np.sin(4 * np.pi * cycles) + 0.1 * np.sin(6 * np.pi * cycles)) / 1.4


def _rising(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    return _sweep(sound, time)


def _falling(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    return _sweep(sound, time)[::-1]


def _beeps(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    # Within a beep and the pause after it.
    position = (time * sound.tempo_hz + sound.phase) % 1
    envelope = np.clip(np.minimum(position, 0.45 - position) * 40, 0, 1)
    return envelope * _timbre(sound.pitch_hz * time)


def _noise(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.random.default_rng(sound.noise_seed).uniform(-1, 1, len(time))


def _hum(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    return _timbre(sound.pitch_hz * time)


def _whistle(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sin(2 * np.pi * (sound.pitch_hz * time + sound.phase))


def _silence(sound: Sound, time: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.zeros_like(time)


_DRAW: dict[str, Callable[[Sound, NDArray[np.float64]], NDArray[np.float64]]] = {
    "rising tone": _rising,
    "falling tone": _falling,
    "beeps": _beeps,
    "noise": _noise,
    "low hum": _hum,
    "whistle": _whistle,
    "silence": _silence,
}
