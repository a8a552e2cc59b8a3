"""Decoded sound: channels, rates, lengths, formats, and what is wrong with files that give none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchaudio.functional import resample

from tests.conftest import (
    MakeAudio,
    MakeVideo,
    add_audio_stream,
    add_video_stream,
    draw_frame,
    draw_tone,
    encode_audio,
    encode_video,
)
from tests.helpers.damage import damage_sound
from video_llama.errors import MediaError, NoAudioTrackError
from video_llama.processor import audio_features as audio_module
from video_llama.processor.audio_features import decode_audio, resample_blocks, to_mono

RATE = 16_000


def noise(num_samples: int, channels: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(channels, num_samples, generator=generator) - 0.5


def loudest_frequency(samples: Tensor, rate_hz: int) -> float:
    spectrum = torch.fft.rfft(samples * torch.hann_window(len(samples))).abs()
    return float(spectrum.argmax()) * rate_hz / len(samples)


@pytest.mark.parametrize("codec", ["pcm_s16le", "pcm_f32le", "pcm_s24le", "pcm_u8"])
def test_a_wav_file_gives_its_samples(make_audio: MakeAudio, codec: str) -> None:
    waveform = decode_audio(make_audio(codec=codec, channels=2, rate_hz=22_050))
    assert (waveform.sample_rate_hz, waveform.samples.dtype) == (22_050, torch.float32)
    expected = torch.from_numpy(draw_tone(1.0, 22_050, 2))
    torch.testing.assert_close(waveform.samples, expected, atol=1 / (64 if codec == "pcm_u8" else 2**14), rtol=0)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("tone.flac", "flac"),
        ("tone.mp3", "libmp3lame"),
        ("tone.ogg", "libopus"),
        ("tone.m4a", "aac"),
        ("tone.mkv", "libmp3lame"),
        ("tone.aiff", "pcm_s16be"),
    ],
)
def test_sound_files_of_every_format_are_decoded(make_audio: MakeAudio, name: str, codec: str) -> None:
    rate_hz = 48_000
    waveform = decode_audio(make_audio(name, codec=codec, rate_hz=rate_hz), RATE)
    assert (waveform.samples.shape[0], waveform.sample_rate_hz) == (1, RATE)
    assert waveform.samples.shape[1] == pytest.approx(RATE, abs=2000)  # lossy codecs work in blocks
    middle = waveform.samples[0, 4000:12_000]
    assert loudest_frequency(middle, RATE) == pytest.approx(440, abs=3)
    assert float(middle.abs().max()) == pytest.approx(0.5, abs=0.05)


def test_the_content_counts_and_not_the_name(make_audio: MakeAudio) -> None:
    path = make_audio()
    renamed = path.rename(path.with_name("tone.mp4"))
    assert decode_audio(renamed).samples.shape == (1, RATE)


def test_the_sound_track_of_a_video_is_decoded(make_video: MakeVideo) -> None:
    waveform = decode_audio(make_video(num_frames=20, fps=10, audio=True))
    assert waveform.sample_rate_hz == RATE
    assert waveform.samples.shape[1] == pytest.approx(2 * RATE, abs=2100)
    assert loudest_frequency(waveform.samples[0, 4000:24_000], RATE) == pytest.approx(440, abs=3)


def test_stereo_becomes_the_mean_of_its_channels_where_the_original_takes_the_first(make_audio: MakeAudio) -> None:
    samples = np.stack([draw_tone(0.5, RATE, 1)[0], draw_tone(0.5, RATE, 1, frequency_hz=1000)[0]])
    path = make_audio(samples=samples, codec="pcm_f32le")
    mono = decode_audio(path, mono=True).samples
    torch.testing.assert_close(mono, torch.from_numpy(samples.mean(axis=0, keepdims=True)), atol=1e-6, rtol=0)
    assert decode_audio(path).samples.shape == (2, RATE // 2)


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 44_100, 48_000])
def test_a_long_sound_is_resampled_as_if_in_one_piece(make_audio: MakeAudio, rate_hz: int) -> None:
    samples = noise(rate_hz * 11).numpy()  # longer than a block
    waveform = decode_audio(make_audio(samples=samples, rate_hz=rate_hz, codec="pcm_f32le"), RATE)
    expected = resample(torch.from_numpy(samples), rate_hz, RATE)
    assert waveform.samples.shape == expected.shape == (1, RATE * 11)
    torch.testing.assert_close(waveform.samples, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [[9000], [1, 4410, 3, 4586], [100] * 90])
def test_blocks_of_any_size_are_resampled_as_one_piece(sizes: list[int]) -> None:
    samples = noise(9000, channels=2)
    pieces = list(resample_blocks(samples.split(sizes, dim=1), 44_100, RATE))
    torch.testing.assert_close(torch.cat(pieces, dim=1), resample(samples, 44_100, RATE), atol=1e-5, rtol=0)


def test_no_blocks_give_no_sound() -> None:
    assert list(resample_blocks([], 44_100, RATE)) == []


def test_a_rate_without_a_common_divisor_does_not_build_a_huge_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[int] = []
    build = audio_module.Resample
    monkeypatch.setattr(
        audio_module,
        "Resample",
        lambda rate_hz, *args, **options: rates.append(rate_hz) or build(rate_hz, *args, **options),
    )
    pieces = list(resample_blocks([noise(44_101)], 44_101, RATE))
    assert rates == [44_100]
    assert sum(piece.shape[1] for piece in pieces) == pytest.approx(RATE, abs=1)


def test_a_very_short_sound_is_kept_as_it_is(make_audio: MakeAudio) -> None:
    samples = noise(3).numpy()
    waveform = decode_audio(make_audio(samples=samples, codec="pcm_f32le"), RATE, mono=True)
    torch.testing.assert_close(waveform.samples, torch.from_numpy(samples))


def test_a_video_without_sound_has_no_sound_track(make_video: MakeVideo) -> None:
    with pytest.raises(NoAudioTrackError, match=r"clip\.mp4: no sound track"):
        decode_audio(make_video())


def test_a_sound_track_without_samples_is_none(tmp_path: Path) -> None:
    path = tmp_path / "silent.wav"
    with av.open(str(path), "w") as container:
        add_audio_stream(container, 1, RATE, "pcm_s16le")
        container.start_encoding()
    with pytest.raises(NoAudioTrackError, match=r"silent\.wav: the sound track is empty"):
        decode_audio(path)


def test_a_sound_track_that_cannot_be_decoded_is_not_the_same_as_none(make_video: MakeVideo) -> None:
    path = make_video(num_frames=20, audio=True)
    damage_sound(path)
    with pytest.raises(MediaError, match=r"clip\.mp4: the sound track is damaged: ") as caught:
        decode_audio(path)
    assert not isinstance(caught.value, NoAudioTrackError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "codec"), [("tone.wav", "pcm_s16le"), ("tone.flac", "flac"), ("tone.m4a", "aac")])
def test_a_truncated_sound_is_an_error_that_names_it(make_audio: MakeAudio, name: str, codec: str) -> None:
    path = make_audio(name, codec=codec)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=rf"{name}: ") as caught:
        decode_audio(path)
    assert not isinstance(caught.value, NoAudioTrackError)


def make_still(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path, format="PNG")


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda path: None, "no such file"),
        (Path.touch, "the file is empty"),
        (Path.mkdir, "a folder, not a file"),
        (lambda path: path.write_text("la la la"), "a text file, not a video"),
        (make_still, "a still image (PNG), not a video"),
        (lambda path: path.write_bytes(b"\x00\x01" * 500), "not a media file, or damaged beyond reading: "),
    ],
)
def test_what_is_no_sound_is_an_error_that_names_file_and_cause(
    tmp_path: Path, make: Callable[[Path], Any], cause: str
) -> None:
    path = tmp_path / "wrong.wav"
    make(path)
    with pytest.raises(MediaError) as caught:
        decode_audio(path)
    assert caught.value.path == str(path)
    assert caught.value.reason.startswith(cause)
    assert not isinstance(caught.value, NoAudioTrackError)


def test_an_implausible_sample_rate_is_damage(make_audio: MakeAudio) -> None:
    path = make_audio()
    content = bytearray(path.read_bytes())
    content[24:28] = (7).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(MediaError, match="a sound track of 7 samples per second"):
        decode_audio(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_an_error(make_audio: MakeAudio, value: float) -> None:
    samples = np.full((1, 2000), value, dtype=np.float32)
    with pytest.raises(MediaError, match="not finite numbers"):
        decode_audio(make_audio(samples=samples, codec="pcm_f32le"))
    with pytest.raises(MediaError, match="not finite numbers"):
        to_mono(samples, RATE, RATE)


def test_the_track_a_player_would_choose_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        video = add_video_stream(container, (64, 48), 10, "libx264")
        tracks = [add_audio_stream(container, 1, RATE, "pcm_s16le") for _ in range(2)]
        tracks[0].disposition = av.stream.Disposition.forced.value
        tracks[1].disposition = av.stream.Disposition.default.value
        encode_video(container, video, [draw_frame(index, 64, 48) for index in range(10)])
        for frequency, track in zip((440, 1000), tracks, strict=True):
            encode_audio(container, track, draw_tone(1.0, RATE, 1, frequency_hz=frequency))
    assert loudest_frequency(decode_audio(path).samples[0], RATE) == pytest.approx(1000, abs=3)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (torch.tensor([0.5, -0.25]), [0.5, -0.25]),
        (np.array([[0.5, -0.25], [0.0, 0.25]]), [0.25, 0.0]),
        (np.array([16_384, -32_768], dtype=np.int16), [0.5, -1.0]),
        (torch.tensor([[2**30, -(2**31)]], dtype=torch.int32), [0.5, -1.0]),
    ],
)
def test_samples_in_memory_become_one_channel_of_full_scale_one(samples: Any, expected: list[float]) -> None:
    waveform = to_mono(samples, RATE, RATE)
    assert waveform.samples.tolist() == [expected]
    assert waveform.samples.dtype == torch.float32


def test_samples_in_memory_are_resampled() -> None:
    samples = noise(44_100, channels=2)
    waveform = to_mono(samples, 44_100, RATE)
    expected = resample(samples.mean(dim=0, keepdim=True), 44_100, RATE)
    assert waveform.sample_rate_hz == RATE
    torch.testing.assert_close(waveform.samples, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("samples", "cause"),
    [
        (torch.zeros(0), r"samples of shape \(0,\)"),
        (torch.zeros(1, 2, 3), r"samples of shape \(1, 2, 3\)"),
        (torch.zeros(5, dtype=torch.int64), "samples of type torch.int64"),
    ],
)
def test_samples_of_another_shape_or_type_are_an_error(samples: Tensor, cause: str) -> None:
    with pytest.raises(MediaError, match=cause):
        to_mono(samples, RATE, RATE)
