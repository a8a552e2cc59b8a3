"""Frames, images and sound against the recorded original: indices and sentences exactly, pixels and mels closely."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_llama.media.decode import DecodedVideo, decode_video
from video_llama.media.sampling import LogMelSettings, sample_segment_starts, sample_uniform_indices, segment_ranges
from video_llama.processor.audio_features import decode_audio, log_mel, log_mel_segments
from video_llama.processor.media_processor import AudioSegments, MediaProcessor
from video_llama.processor.transforms import normalize_frames

ReadJson = Callable[[str], Any]
Arrays = dict[str, NDArray[Any]]

MAX_FRAME_DIFFERENCE = 2.0  # of 255, mean over a frame: the reference's decoder brings its own scaler
TOLERANCE = 1e-4
SPACINGS = ("pv015", "main")


def read_arrays(reference: Path, name: str) -> Arrays:
    with np.load(reference / f"{name}.npz") as arrays:
        return dict(arrays)


def video_processor(recorded: dict[str, Any], size: int, num_frames: int = 1) -> MediaProcessor:
    return MediaProcessor(image_size=size, num_frames=num_frames, mean=recorded["mean"], std=recorded["std"])


def recorded_videos(recorded: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int, dict[str, Any]]]:
    """Each video with each number of frames it was sampled at, and what came out."""
    assert recorded["videos"]
    for video in recorded["videos"]:
        for num_frames, result in video["results"].items():
            yield video, int(num_frames), result


def mean_colours(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    means: NDArray[np.float64] = frames.reshape(len(frames), -1, 3).mean(axis=1, dtype=np.float64)
    return means


def relative_error(values: Tensor, expected: Tensor) -> float:
    """Of the whole: single mel bins of almost no energy are rounding errors under a logarithm."""
    return float((values - expected).norm() / expected.norm())


def log_mel_settings(recorded: dict[str, Any]) -> LogMelSettings:
    constants = recorded["constants"]
    assert constants["htk_compat"]
    assert not constants["use_energy"]
    assert (constants["window"], constants["dither"]) == ("hanning", 0.0)
    return LogMelSettings(
        sample_rate_hz=constants["sample_rate"],
        segment_seconds=constants["clip_duration"],
        num_mel_bins=constants["num_mel_bins"],
        num_mel_frames=constants["target_length"],
        mean=constants["mean"],
        std=constants["std"],
        frame_length_ms=constants["frame_length_ms"],
        frame_shift_ms=constants["frame_shift_ms"],
    )


def recorded_sounds(
    reference: Path, recorded: dict[str, Any], settings: LogMelSettings
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each sound file with its samples (channels, samples) at the rate of the log-mel."""
    assert recorded["files"]
    for file in recorded["files"]:
        yield file, decode_audio(reference / "media" / "audio" / file["file"], settings.sample_rate_hz).samples


def edited_in_place(samples: Tensor, ranges: list[tuple[int, int]], settings: LogMelSettings) -> Tensor:
    """The reference's log-mel: every clip is a view, its mean over all channels is subtracted from the waveform
    itself, so that clips that overlap change the next; then the first channel alone is used."""
    edited, mels = samples.clone(), []
    for start, stop in ranges:
        clip = edited[:, start:stop]
        clip -= clip.mean()
        mels.append(log_mel(clip[0], settings))
    return (torch.stack(mels) - settings.mean) / settings.std  # (segments, mel_bins, mel_frames)


def overlaps(result: dict[str, Any]) -> bool:
    """Whether clips overlap in part; in a sound shorter than a clip all are the same."""
    return any(start < later < stop for (start, stop), (later, _) in pairwise(result["sample_ranges"]))


def process_sound(reference: Path, file: dict[str, Any], spacing: Any, settings: LogMelSettings) -> AudioSegments:
    count = file[spacing]["shape"][1]
    processor = MediaProcessor(num_audio_segments=count, segment_spacing=spacing, log_mel=settings)
    return processor.process_audio(reference / "media" / "audio" / file["file"])


def check_clips(clips: Tensor, file: dict[str, Any], spacing: str, arrays: Arrays) -> bool:
    """Compare all clips with the recorded statistics and, if there are any, with the recorded values."""
    result = file[spacing]
    np.testing.assert_allclose(
        clips.mean(dim=(1, 2)), result["clip_means"], rtol=TOLERANCE, atol=1e-5, err_msg=file["file"]
    )
    np.testing.assert_allclose(
        clips.std(dim=(1, 2)), result["clip_stds"], rtol=TOLERANCE, atol=1e-5, err_msg=file["file"]
    )
    stored = arrays.get(f"{file['file']}|{spacing}")
    if stored is not None:
        assert relative_error(clips[result["stored_clips"]], torch.from_numpy(stored)) <= TOLERANCE, file["file"]
    return stored is not None


def test_uniform_indices_are_the_recorded_ones(reference_json: ReadJson) -> None:
    table = reference_json("common/frame_indices.json")["table"]
    assert table
    for key, indices in table.items():
        num_frames, num_source_frames = map(int, key.split(","))
        assert sample_uniform_indices(num_source_frames, num_frames) == indices, key


def test_videos_give_the_recorded_indices_and_sentences(reference: Path, reference_json: ReadJson) -> None:
    recorded = reference_json("video.json")
    for video, num_frames, result in recorded_videos(recorded):
        channels, length, height, _width = result["shape_CTHW"]
        processor = video_processor(recorded, height, num_frames)
        frames, _ = processor.process_video(reference / "media" / video["file"], audio=False)
        assert frames.indices == result["indices"], video["file"]
        assert frames.message == result["msg"], video["file"]
        assert frames.pixel_values.shape == (length, channels, height, height)


def test_frames_are_the_recorded_ones(reference: Path, reference_json: ReadJson) -> None:
    recorded, arrays = reference_json("video.json"), read_arrays(reference, "video_frames")
    compared = 0
    for video, num_frames, result in recorded_videos(recorded):
        decoded = decode_video(reference / "media" / video["file"], num_frames, *result["shape_CTHW"][2:])
        assert (decoded.num_source_frames, decoded.fps) == (video["num_frames"], pytest.approx(video["avg_fps"]))
        assert len(decoded.frames) == result["n_frames"]
        difference = np.abs(mean_colours(decoded.frames) - result["frame_mean_rgb"])
        assert difference.max() <= MAX_FRAME_DIFFERENCE, video["file"]
        for position, frame in enumerate(decoded.frames):
            stored = arrays.get(f"{video['file']}|{num_frames}|{position}")
            if stored is not None:
                assert np.abs(frame.astype(int) - stored).mean() <= MAX_FRAME_DIFFERENCE, video["file"]
                compared += 1
    assert compared == len(arrays)


def test_frames_of_the_videos_own_size_have_the_recorded_colours(reference: Path, reference_json: ReadJson) -> None:
    for video in reference_json("video.json")["videos"]:
        native = video["native_first_frames"]
        count, height, width, _ = native["shape"]
        decoded: DecodedVideo = decode_video(
            reference / "media" / video["file"], count, height, width, sample=lambda _, wanted: list(range(wanted))
        )
        assert decoded.frames.shape == tuple(native["shape"])
        difference = np.abs(mean_colours(decoded.frames) - native["mean_rgb"])
        assert difference.max() <= MAX_FRAME_DIFFERENCE, video["file"]


def test_frames_are_normalised_as_recorded(reference: Path, reference_json: ReadJson) -> None:
    recorded = reference_json("video.json")
    tolerance = MAX_FRAME_DIFFERENCE / 255 / min(recorded["std"])  # what the decoder may differ by
    for video, num_frames, result in recorded_videos(recorded):
        expected = result["eval_transform"]
        processor = video_processor(recorded, expected["shape"][-1], num_frames)
        frames, _ = processor.process_video(reference / "media" / video["file"], audio=False)
        pixels = frames.pixel_values.double()
        assert list(pixels.transpose(0, 1).shape) == expected["shape"]
        assert float(pixels.mean()) == pytest.approx(expected["mean"], abs=tolerance)
        assert float(pixels.std()) == pytest.approx(expected["std"], abs=tolerance)
        channel_means = torch.tensor(expected["per_frame_channel_mean"], dtype=torch.float64)
        torch.testing.assert_close(pixels.mean(dim=(2, 3)), channel_means, atol=tolerance, rtol=0)


def test_recorded_pixels_are_normalised_to_the_recorded_values(reference: Path, reference_json: ReadJson) -> None:
    recorded = reference_json("video.json")
    frames, images = read_arrays(reference, "video_frames"), read_arrays(reference, "image_u8")
    transforms = read_arrays(reference, "transform_f32")
    assert transforms
    for key, expected in transforms.items():
        source, _, what = key.rpartition("|")
        position = what.removeprefix("frame").removesuffix("_eval_transform")
        pixels = frames[f"{source}|{position}"] if "|" in source else images[source]
        values = normalize_frames(pixels[np.newaxis], tuple(recorded["mean"]), tuple(recorded["std"]))
        torch.testing.assert_close(values[0], torch.from_numpy(expected), rtol=TOLERANCE, atol=1e-6)


def test_images_of_every_mode_give_the_recorded_pixels(reference: Path, reference_json: ReadJson) -> None:
    """The original crashes where a mode other than RGB is not converted first; what is recorded is with it."""
    recorded, arrays = reference_json("video.json"), read_arrays(reference, "image_u8")
    assert recorded["images"]
    (size,) = {array.shape[0] for array in arrays.values()}
    processor = video_processor(recorded, size)
    for image in recorded["images"]:
        result = processor.process_image(reference / "media" / "images" / image["file"])
        pixels = result.frames[0]
        if image["file"].endswith(".png"):  # decoders of JPEG may round differently
            assert hashlib.sha256(pixels.tobytes()).hexdigest() == image["sha256_u8"], image["file"]
        if image["file"] in arrays:
            assert np.abs(pixels.astype(int) - arrays[image["file"]]).max() <= 1, image["file"]
        values = result.pixel_values.double()
        assert values.shape == (1, 3, size, size)
        assert float(values.mean()) == pytest.approx(image["eval_mean"], rel=TOLERANCE, abs=TOLERANCE)
        assert float(values.std()) == pytest.approx(image["eval_std"], rel=TOLERANCE)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_segments_are_the_recorded_stretches(reference: Path, reference_json: ReadJson, spacing: Any) -> None:
    recorded = reference_json("audio.json")
    settings = log_mel_settings(recorded)
    for file, samples in recorded_sounds(reference, recorded, settings):
        result = file[spacing]
        count, seconds = result["shape"][1], settings.segment_seconds
        assert samples.shape == (file["channels"], result["n_resampled"])
        ranges = segment_ranges(samples.shape[1], count, spacing, settings)
        assert [list(bounds) for bounds in ranges] == result["sample_ranges"], file["file"]
        starts = sample_segment_starts(file["duration"], count, seconds, spacing)
        times = [(float(start), float(start + seconds)) for start in starts]
        np.testing.assert_allclose(times, result["clip_times"], rtol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_sound_becomes_the_recorded_log_mel_where_clips_do_not_overlap(
    reference: Path, reference_json: ReadJson, spacing: Any
) -> None:
    recorded, arrays = reference_json("audio.json"), read_arrays(reference, "audio_mel")
    settings = log_mel_settings(recorded)
    compared = 0
    for file in recorded["files"]:
        result = file[spacing]
        if file["channels"] != 1 or overlaps(result):  # the original uses the first channel alone
            continue
        segments = process_sound(reference, file, spacing, settings)
        assert [1, *segments.values.shape] == result["shape"]
        assert segments.duration_seconds == pytest.approx(file["duration"])
        assert segments.start_seconds == pytest.approx([start for start, _ in result["clip_times"]], abs=1e-3)
        check_clips(segments.values[:, 0], file, spacing, arrays)
        compared += 1
    if not compared:
        pytest.skip("this reference has no mono sound whose clips lie apart")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_recorded_log_mel_follows_from_the_originals_edits_of_the_waveform(
    reference: Path, reference_json: ReadJson, spacing: Any
) -> None:
    recorded, arrays = reference_json("audio.json"), read_arrays(reference, "audio_mel")
    settings = log_mel_settings(recorded)
    compared = 0
    for file, samples in recorded_sounds(reference, recorded, settings):
        first_samples = arrays.get(f"{file['file']}|resampled16k_first2000_ch0")
        if first_samples is not None:
            np.testing.assert_allclose(samples[0, : len(first_samples)], first_samples, atol=1e-6)
        ranges = segment_ranges(samples.shape[1], file[spacing]["shape"][1], spacing, settings)
        compared += check_clips(edited_in_place(samples, ranges, settings), file, spacing, arrays)
    assert compared == sum(key.endswith(f"|{spacing}") for key in arrays)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_overlapping_clips_do_not_change_each_other_as_they_do_in_the_original(
    reference: Path, reference_json: ReadJson, spacing: Any
) -> None:
    """The mean of each clip is taken on a copy, of all channels: a clip is the same as without the others."""
    recorded = reference_json("audio.json")
    settings = log_mel_settings(recorded)
    effects = []
    for file, samples in recorded_sounds(reference, recorded, settings):
        clips = process_sound(reference, file, spacing, settings).values
        mono = samples.mean(dim=0)
        ranges = segment_ranges(len(mono), len(clips), spacing, settings)
        alone = {bounds: log_mel_segments(mono, [bounds], settings) for bounds in set(ranges)}
        assert relative_error(clips, torch.cat([alone[bounds] for bounds in ranges])) <= TOLERANCE, file["file"]
        if file["channels"] == 1 and overlaps(file[spacing]):
            effects.append(float((clips[:, 0] - edited_in_place(samples, ranges, settings)).abs().max()))
    if not effects:
        pytest.skip("this reference has no mono sound whose clips overlap")
    assert max(effects) > 10 * TOLERANCE
