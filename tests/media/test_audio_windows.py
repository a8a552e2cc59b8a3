"""A part of a sound is that part of the whole sound, and only that part is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.conftest import add_video_stream, draw_frame
from video_llama.errors import NoAudioTrackError
from video_llama.media import audio
from video_llama.processor.audio_features import Waveform, decode_audio, decode_audio_window
from video_llama.processor.media_processor import MediaProcessor

RATE = 16_000


def sweep(seconds: float, rate_hz: int, channels: int = 1) -> np.ndarray:
    """A tone that rises all the time, so that no moment sounds like another."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    tone = 0.4 * np.sin(2 * np.pi * (200 + 60 * time) * time)
    return np.stack([tone / (channel + 1) for channel in range(channels)]).astype(np.float32)


@pytest.mark.parametrize(("start", "end"), [(0.0, 2.0), (3.0, 5.5), (6.25, None), (0.1, 0.2)])
@pytest.mark.parametrize(
    ("name", "rate_hz", "channels", "codec", "tolerance"),
    [
        ("tone.wav", 16_000, 1, "pcm_s16le", 1e-6),
        ("tone.wav", 44_100, 2, "pcm_s16le", 1e-5),
        ("tone.mp4", 48_000, 2, "aac", 1e-3),
        ("tone.mp3", 44_100, 1, "mp3", 1e-3),
        ("tone.flac", 22_050, 1, "flac", 1e-5),
    ],
)
def test_a_window_is_that_part_of_the_whole_sound(
    make_audio: Callable[..., Path],
    name: str,
    rate_hz: int,
    channels: int,
    codec: str,
    tolerance: float,
    start: float,
    end: float | None,
) -> None:
    path = make_audio(name, rate_hz=rate_hz, codec=codec, samples=sweep(8.0, rate_hz, channels))
    whole = decode_audio(path, RATE, mono=True).samples
    window = decode_audio_window(path, start, end, RATE)
    expected = whole[:, round(start * RATE) : None if end is None else round(end * RATE)]
    assert window.sample_rate_hz == RATE
    assert window.samples.shape == expected.shape
    assert (window.samples - expected).abs().max() < tolerance


def test_only_the_window_and_a_little_more_is_decoded(
    make_audio: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_audio("tone.mp4", rate_hz=48_000, codec="aac", samples=sweep(60.0, 48_000))
    decoded: list[int] = []
    decode = audio.decode_timed_frames

    def count(*args: object, **options: object) -> object:
        for time, samples in decode(*args, **options):
            decoded.append(samples.shape[-1])
            yield time, samples

    monkeypatch.setattr(audio, "decode_timed_frames", count)
    decode_audio_window(path, 40.0, 42.0, RATE)
    assert 2 * 48_000 < sum(decoded) < 5 * 48_000


@pytest.mark.parametrize("fails", ["seeking", "times"])
def test_a_format_without_seeking_is_decoded_from_its_start(
    make_audio: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = make_audio("tone.wav", samples=sweep(6.0, RATE))
    expected = decode_audio(path, RATE, mono=True).samples[:, 4 * RATE : 5 * RATE]
    if fails == "seeking":
        monkeypatch.setattr(audio, "_seek", lambda *args, **options: False)
    else:
        decode = audio.decode_timed_frames
        monkeypatch.setattr(
            audio, "decode_timed_frames", lambda *args, **options: ((None, samples) for _, samples in decode(*args))
        )
    assert (decode_audio_window(path, 4.0, 5.0, RATE).samples - expected).abs().max() < 1e-6


def write_clicks(
    path: Path, spans: list[tuple[float, float]], click: float, video: tuple[float, float] | None = None
) -> Path:
    """Noise of 0.1 s at a second of an otherwise silent track that exists in these spans, beside a video or not."""
    rate = 8_000
    with av.open(str(path), "w") as container:
        stream = add_video_stream(container, (64, 48), 10, "libx264") if video else None
        track = container.add_stream("flac", rate=rate, layout="mono")
        packets = []
        for number in range(round((video[1] - video[0]) * 10) if video else 0):
            assert stream is not None
            assert video is not None
            frame = av.VideoFrame.from_ndarray(draw_frame(number, 64, 48), format="rgb24")
            frame.pts, frame.time_base = round(video[0] * 10) + number, Fraction(1, 10)
            packets += stream.encode(frame)
        packets += stream.encode() if stream is not None else []
        noise = np.random.default_rng(0).integers(-9_000, 9_000, (1, 800)).astype(np.int16)
        for start, end in spans:
            for first in range(round(start * 10), round(end * 10)):
                samples = noise if first == round(click * 10) else np.zeros_like(noise)
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = rate, first * 800, Fraction(1, rate)
                packets += track.encode(frame)
        packets += track.encode()
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            container.mux(packet)
    return path


def clicks(waveform: Waveform) -> list[float]:
    """From and to when there is something, in seconds; nothing for silence."""
    loud = np.flatnonzero(waveform.samples[0].abs().numpy() > 0.02) / waveform.sample_rate_hz
    return [round(float(second), 1) for second in loud[[0, -1]]] if loud.size else []


@pytest.mark.parametrize(
    ("name", "spans", "click", "video", "expected"),
    [
        # Beyond what FFmpeg looks at when it opens a file: it says that these tracks begin with the others.
        ("late_audio.mkv", [(20.0, 30.0)], 25.0, (0.0, 30.0), 25.0),
        ("late_video.mkv", [(0.0, 30.0)], 25.0, (20.0, 30.0), 5.0),
        ("long_gap.mkv", [(0.0, 20.0), (60.0, 75.0)], 65.0, (0.0, 75.0), 65.0),
        ("no_video.mka", [(0.0, 20.0), (60.0, 75.0)], 65.0, None, 65.0),
        ("begins_at_5.mka", [(5.0, 12.0)], 7.0, None, 2.0),
    ],
)
def test_audio_is_on_the_clock_of_the_frames_whole_and_in_windows(
    tmp_path: Path,
    name: str,
    spans: list[tuple[float, float]],
    click: float,
    video: tuple[float, float] | None,
    expected: float,
) -> None:
    path = write_clicks(tmp_path / name, spans, click, video)
    whole = decode_audio(path, RATE, mono=True)
    assert clicks(whole) == pytest.approx([expected, expected + 0.1], abs=0.11)
    end = spans[-1][1] - (video[0] if video else spans[0][0])
    assert whole.samples.shape[1] / RATE == pytest.approx(end, abs=0.01)
    for start in np.arange(0.0, end - 1.0, 5.0).tolist():
        window = decode_audio_window(path, start, start + 5.0, RATE)
        expected_samples = whole.samples[:, round(start * RATE) : round((start + 5.0) * RATE)]
        assert window.samples.shape == expected_samples.shape
        assert (window.samples - expected_samples).abs().max() < 1e-3
    segments = MediaProcessor(num_audio_segments=8).process_audio(path)
    assert segments.duration_seconds == pytest.approx(end, abs=0.01)


def test_a_window_after_the_end_or_without_a_track_has_no_sound(
    make_audio: Callable[..., Path], make_video: Callable[..., Path]
) -> None:
    with pytest.raises(NoAudioTrackError, match=r"no sound from 5\.0 seconds on"):
        decode_audio_window(make_audio("tone.wav", seconds=2.0), 5.0, 7.0, RATE)
    with pytest.raises(NoAudioTrackError, match="no sound track"):
        decode_audio_window(make_video("silent.mp4"), 0.0, 1.0, RATE)


@pytest.mark.parametrize(
    ("name", "rate_hz", "codec", "tolerance"),
    [
        ("tone.wav", 44_100, "pcm_s16le", 1e-6),
        ("tone.mp4", 48_000, "aac", 0.02),
        ("tone.mkv", 48_000, "aac", 0.02),
        ("tone.mp3", 44_100, "mp3", 0.02),
        ("tone.flac", 22_050, "flac", 1e-6),
        ("tone.webm", 48_000, "libopus", 0.02),
    ],
)
@pytest.mark.slow
def test_the_segments_of_a_long_sound_are_those_of_the_whole_and_little_more_is_decoded(
    make_audio: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    rate_hz: int,
    codec: str,
    tolerance: float,
) -> None:
    processor = MediaProcessor(num_audio_segments=3)
    path = make_audio(name, rate_hz=rate_hz, codec=codec, samples=sweep(61.3, rate_hz))
    monkeypatch.setattr(audio, "LONG_AUDIO_SECONDS", 1e9)
    whole = processor.process_audio(path)
    monkeypatch.undo()
    monkeypatch.setattr(audio, "decode_blocks", _must_not_be_called)
    seconds = _count_decoded(monkeypatch, rate_hz)
    sparse = processor.process_audio(path)
    slack = 0.009 if codec == "libopus" else 0.0011  # mkv counts milliseconds; FFmpeg 7 counts Opus's delay, too
    assert sparse.duration_seconds == pytest.approx(whole.duration_seconds, abs=slack)
    assert sparse.start_seconds == pytest.approx(whole.start_seconds, abs=slack)
    assert (sparse.values - whole.values).abs().mean() < tolerance
    assert 6.0 < sum(seconds) < 25.0


@pytest.mark.parametrize("why", ["short", "many segments", "no seeking", "no times", "a wrong length"])
def test_what_cannot_be_sought_or_is_not_long_is_decoded_whole(
    make_audio: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    path = make_audio("tone.wav", samples=sweep(59.0 if why == "short" else 61.0, RATE))
    processor = MediaProcessor(num_audio_segments=16 if why == "many segments" else 2)
    expected = processor.process_audio((decode_audio(path, RATE, mono=True).samples, RATE))
    if why == "no seeking":
        monkeypatch.setattr(audio, "_seek", lambda *args, **options: False)
    elif why == "no times":
        decode = audio.decode_timed_frames
        monkeypatch.setattr(
            audio, "decode_timed_frames", lambda *args, **options: ((None, samples) for _, samples in decode(*args))
        )
    elif why == "a wrong length":
        measure = audio._measure
        monkeypatch.setattr(audio, "_measure", lambda track, rate: measure(replace(track, end_seconds=300.0), rate))
    monkeypatch.setattr(audio, "_read_part", _must_not_be_called)
    found = processor.process_audio(path)
    assert torch.equal(found.values, expected.values)
    assert found.start_seconds == expected.start_seconds


def _must_not_be_called(*args: object, **kwargs: object) -> None:
    raise AssertionError("the other way should have been taken")


def _count_decoded(monkeypatch: pytest.MonkeyPatch, rate_hz: int) -> list[float]:
    seconds: list[float] = []
    decode = audio.decode_timed_frames

    def count(*args: object, **options: object) -> object:
        for time, samples in decode(*args, **options):
            seconds.append(samples.shape[-1] / rate_hz)
            yield time, samples

    monkeypatch.setattr(audio, "decode_timed_frames", count)
    return seconds
