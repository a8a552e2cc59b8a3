"""The media processor: settings, and files to tensors."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import MakeAudio, MakeVideo, draw_tone, frame_number
from tests.helpers.damage import damage_sound
from video_llama.errors import ConfigError, MediaError, NoAudioTrackError
from video_llama.media import decode
from video_llama.media.image import resize_image
from video_llama.media.sampling import LogMelSettings
from video_llama.processor.audio_features import log_mel_segments
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames
from video_llama.processor.transforms import normalize_frames
from video_llama.registry import VIDEO_READERS

SIZE, RATE = 28, 16_000
PROCESSOR = MediaProcessor(image_size=SIZE, num_frames=4, num_audio_segments=3)
TRAINING = dataclasses.replace(PROCESSOR, sampling="headtail", crop_scale=(0.3, 0.9))


def assert_same(first: VideoFrames, second: VideoFrames) -> None:
    assert first.indices == second.indices
    assert torch.equal(first.pixel_values, second.pixel_values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 0}, "image_size must be a whole number of at least 1, not 0"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1"),
        ({"num_audio_segments": -1}, "num_audio_segments must be a whole number of at least 1"),
        ({"mean": (0.5, 0.5)}, "mean and std need three values"),
        ({"std": (0.5, 0.5, 0.0)}, "std above 0"),
        ({"sampling": "random"}, "sampling must be 'uniform' or 'headtail', not 'random'"),
        ({"segment_spacing": "even"}, "segment_spacing must be 'main' or 'pv015', not 'even'"),
        ({"log_mel": {"mel_bins": 64}}, "log_mel: .*'mel_bins'"),
        ({"crop_scale": (0.9, 0.5)}, "scale of crops must rise within 0 to 1"),
        ({"crop_scale": (0.0, 0.5)}, "scale of crops must rise within 0 to 1"),
        ({"crop_scale": (0.5, 1.5)}, "scale of crops must rise within 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MediaProcessor(**settings)


def test_settings_survive_a_config_and_a_data_loader() -> None:
    processor = MediaProcessor(crop_scale=(0.5, 1.0), log_mel=LogMelSettings(num_mel_bins=64), mean=(0.1, 0.2, 0.3))
    as_lists = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(processor).items()}
    assert MediaProcessor(**as_lists) == processor
    assert pickle.loads(pickle.dumps(processor)) == processor


def test_a_video_becomes_normalised_frames_with_their_times_and_its_sound(make_video: MakeVideo) -> None:
    path = make_video(num_frames=20, fps=10, audio=True)
    frames, sound = PROCESSOR.process_video(path)
    assert (frames.kind, frames.source, frames.indices) == ("video", str(path), [0, 5, 10, 15])
    assert [frame_number(frame) for frame in frames.frames] == frames.indices
    assert frames.message == "The video contains 4 frames sampled at 0.0, 0.5, 1.0, 1.5 seconds. "
    assert frames.pixel_values.shape == (4, 3, SIZE, SIZE)
    assert torch.equal(frames.pixel_values, normalize_frames(frames.frames, PROCESSOR.mean, PROCESSOR.std))
    assert sound is not None
    assert (sound.values.shape, sound.source) == ((3, 1, 128, 204), str(path))
    assert sound.duration_seconds == pytest.approx(2, abs=0.15)


def test_mean_std_and_size_are_the_settings_ones(make_video: MakeVideo) -> None:
    plain = MediaProcessor(image_size=20, mean=(0.0,) * 3, std=(1.0,) * 3)
    frames, _ = plain.process_video(make_video(), num_frames=2)
    assert frames.pixel_values.shape == (2, 3, 20, 20)
    torch.testing.assert_close(frames.pixel_values.permute(0, 2, 3, 1) * 255, torch.tensor(frames.frames).float())


@pytest.mark.parametrize(("num_frames", "expected"), [(None, 4), (2, 2), (64, 6)])
def test_the_number_of_frames_can_be_asked_for_and_a_short_video_gives_all(
    make_video: MakeVideo, num_frames: int | None, expected: int
) -> None:
    frames, _ = PROCESSOR.process_video(make_video(num_frames=6), num_frames=num_frames)
    assert len(frames.indices) == len(frames.pixel_values) == expected


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_the_reader_is_a_setting(make_video: MakeVideo, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, names = VIDEO_READERS.get(reader), []
    monkeypatch.setattr(decode, "_find_reader", lambda name: lambda *args: names.append(name) or opened(*args))
    dataclasses.replace(PROCESSOR, video_reader=reader).process_video(make_video())
    assert names == [reader]


def test_a_video_without_sound_and_one_whose_sound_is_not_wanted_have_none(make_video: MakeVideo) -> None:
    assert PROCESSOR.process_video(make_video("silent.mp4"))[1] is None
    assert PROCESSOR.process_video(make_video("sounding.mp4", audio=True), audio=False)[1] is None


def test_a_sound_track_that_cannot_be_decoded_is_an_error_that_says_how_to_go_on(make_video: MakeVideo) -> None:
    path = make_video(num_frames=20, audio=True)
    damage_sound(path)
    with pytest.raises(MediaError, match=r"the sound track is damaged: .* \(audio=False ignores the sound\)") as caught:
        PROCESSOR.process_video(path)
    assert not isinstance(caught.value, NoAudioTrackError)
    frames, sound = PROCESSOR.process_video(path, audio=False)
    assert (len(frames.frames), sound) == (4, None)


def test_an_image_is_a_video_of_one_frame_without_times(tmp_path: Path) -> None:
    path, image = tmp_path / "still.png", Image.effect_noise((40, 30), 64).convert("RGB")
    image.save(path)
    still = PROCESSOR.process_image(path)
    assert (still.kind, still.source, still.message) == ("image", str(path), "")
    assert (still.times_seconds, still.indices) == ([], [])
    np.testing.assert_array_equal(still.frames, resize_image(image, SIZE)[np.newaxis])
    assert torch.equal(still.pixel_values, normalize_frames(still.frames, PROCESSOR.mean, PROCESSOR.std))
    for source in (image, np.asarray(image)):
        in_memory = PROCESSOR.process_image(source)
        assert in_memory.source == "image"
        assert_same(in_memory, still)


def test_a_sound_becomes_segments_that_span_it(make_audio: MakeAudio) -> None:
    path = make_audio(samples=draw_tone(7.0, RATE, 1), codec="pcm_f32le")
    segments = PROCESSOR.process_audio(path)
    assert (segments.source, segments.duration_seconds) == (str(path), 7.0)
    assert segments.start_seconds == [0.0, 2.5, 5.0]
    samples = torch.from_numpy(draw_tone(7.0, RATE, 1)[0])
    ranges = [(0, 32_000), (40_000, 72_000), (80_000, 112_000)]
    torch.testing.assert_close(segments.values, log_mel_segments(samples, ranges, PROCESSOR.log_mel))


def test_the_other_spacing_stops_short_of_the_end(make_audio: MakeAudio) -> None:
    segments = dataclasses.replace(PROCESSOR, segment_spacing="pv015").process_audio(make_audio(seconds=8.0))
    assert segments.start_seconds == [0.0, 2.0, 4.0]


def test_samples_in_memory_are_a_sound_at_any_rate() -> None:
    samples = draw_tone(3.0, 44_100, 2)
    segments = PROCESSOR.process_audio((samples, 44_100))
    assert (segments.source, segments.start_seconds) == ("sound", [0.0, 0.5, 1.0])
    assert segments.duration_seconds == pytest.approx(3.0)
    assert torch.equal(PROCESSOR.process_audio((torch.from_numpy(samples), 44_100)).values, segments.values)


@pytest.mark.parametrize("num_samples", [1, 100, 399, 20_000])
def test_a_sound_shorter_than_a_segment_is_padded(num_samples: int) -> None:
    segments = PROCESSOR.process_audio((np.linspace(-0.5, 0.5, num_samples, dtype=np.float32), RATE))
    assert segments.values.shape == (3, 1, 128, 204)
    assert segments.values.isfinite().all()
    assert segments.start_seconds == [0.0] * 3
    assert segments.duration_seconds == num_samples / RATE
    padding = -PROCESSOR.log_mel.mean / PROCESSOR.log_mel.std
    assert segments.values[..., -1].unique().tolist() == [pytest.approx(padding)]


def test_the_sound_of_a_file_without_any_is_an_error(make_video: MakeVideo) -> None:
    with pytest.raises(NoAudioTrackError):
        PROCESSOR.process_audio(make_video())


def test_frames_and_segments_can_change_device_and_type(make_video: MakeVideo) -> None:
    frames, sound = PROCESSOR.process_video(make_video(audio=True))
    assert sound is not None
    moved, moved_sound = frames.to("meta", torch.float16), sound.to("meta", torch.float16)
    assert isinstance(moved, VideoFrames)
    assert isinstance(moved_sound, AudioSegments)
    assert (moved.pixel_values.device.type, moved.pixel_values.dtype) == ("meta", torch.float16)
    assert (moved_sound.values.device.type, moved_sound.values.dtype) == ("meta", torch.float16)
    assert (moved.message, moved_sound.start_seconds) == (frames.message, sound.start_seconds)
    assert frames.to("cpu").pixel_values.dtype == sound.to("cpu").values.dtype == torch.float32


def test_training_cuts_all_frames_of_a_video_alike_and_takes_them_from_both_halves(make_video: MakeVideo) -> None:
    path = make_video(num_frames=1, size=(64, 64))
    frames, _ = TRAINING.process_video(path)
    assert frames.indices == [0] * 4  # as many as asked, by repeating
    assert all(np.array_equal(frame, frames.frames[0]) for frame in frames.frames)
    assert not np.array_equal(frames.frames, PROCESSOR.process_video(path)[0].frames.repeat(4, axis=0))
    indices = TRAINING.process_video(make_video(num_frames=20))[0].indices
    assert len([index for index in indices if index < 10]) == 2


def test_training_is_reproducible_with_torchs_seed(make_video: MakeVideo) -> None:
    path, image = make_video(num_frames=24), Image.effect_noise((40, 30), 64)

    def draw(seed: int) -> tuple[VideoFrames, VideoFrames]:
        torch.manual_seed(seed)
        return TRAINING.process_video(path)[0], TRAINING.process_image(image)

    (video, still), (video_again, still_again), (other_video, other_still) = draw(1), draw(1), draw(2)
    assert_same(video, video_again)
    assert_same(still, still_again)
    assert not torch.equal(video.pixel_values, other_video.pixel_values)
    assert not torch.equal(still.pixel_values, other_still.pixel_values)


def test_use_draws_nothing_at_random(make_video: MakeVideo, make_audio: MakeAudio) -> None:
    state = torch.get_rng_state()
    PROCESSOR.process_video(make_video(audio=True))
    PROCESSOR.process_image(Image.new("RGB", (9, 9)))
    PROCESSOR.process_audio(make_audio())
    assert torch.equal(torch.get_rng_state(), state)


# Sound that was read for another model

OTHER_MEL = LogMelSettings(num_mel_bins=64, mean=-3.0)
OTHER = MediaProcessor(num_audio_segments=5, segment_spacing="pv015", log_mel=OTHER_MEL)
FASTER = MediaProcessor(log_mel=LogMelSettings(sample_rate_hz=22_050, segment_seconds=1.5, num_mel_frames=150))


@pytest.mark.parametrize("own", [OTHER, FASTER], ids=["other mel and number", "other rate and length"])
@pytest.mark.parametrize("given", ["short file", "long file", "samples"])
def test_sound_becomes_what_another_processor_would_have_given(
    given: str, own: MediaProcessor, make_audio: MakeAudio
) -> None:
    sound: Any = (draw_tone(7.0, 44_100, 2), 44_100)
    if given != "samples":
        seconds = 7.0 if given == "short file" else 65.0
        sound = make_audio("tone.wav", samples=draw_tone(seconds, 44_100, 2), codec="pcm_f32le", rate_hz=44_100)
    expected, read = own.process_audio(sound), MediaProcessor().process_audio(sound)
    adapted = own.adapt_audio(read)
    assert torch.equal(adapted.values, expected.values)
    assert (adapted.start_seconds, adapted.duration_seconds) == (expected.start_seconds, expected.duration_seconds)
    assert own.adapt_audio(expected) is expected


def test_log_mel_alone_is_made_of_what_was_decoded_even_if_the_file_is_gone(make_audio: MakeAudio) -> None:
    own = MediaProcessor(log_mel=OTHER_MEL)
    path = make_audio(samples=draw_tone(65.0, RATE, 1))
    read, expected = MediaProcessor().process_audio(path), own.process_audio(path)
    path.unlink()
    assert torch.equal(own.adapt_audio(read).values, expected.values)
    with pytest.raises(MediaError, match=r"no such file \(this model wants other parts of the sound"):
        OTHER.adapt_audio(read)


def test_a_number_of_segments_that_somebody_chose_stays(make_audio: MakeAudio) -> None:
    read = dataclasses.replace(PROCESSOR, num_audio_segments=4).process_audio(make_audio(seconds=9.0))
    adapted = MediaProcessor(log_mel=OTHER_MEL).adapt_audio(read)
    assert adapted.values.shape == (4, 1, 64, 204)
    assert adapted.start_seconds == read.start_seconds


def test_picked_segments_are_adapted_as_they_were_picked_moved_and_converted(make_audio: MakeAudio) -> None:
    path = make_audio(seconds=20.0)
    read = MediaProcessor().process_audio(path)
    whole = MediaProcessor(log_mel=OTHER_MEL).process_audio(path)
    adapted = OTHER.adapt_audio(read[2:][::2].half())
    assert adapted.dtype == torch.float16
    assert torch.equal(adapted.values, whole.values[[2, 4, 6]].half())
    assert adapted.start_seconds == [read.start_seconds[place] for place in (2, 4, 6)]


def test_values_that_were_changed_are_not_made_anew_without_the_change(make_audio: MakeAudio) -> None:
    read = MediaProcessor().process_audio(make_audio())
    silenced = dataclasses.replace(read, values=torch.zeros_like(read.values))
    assert OTHER.adapt_audio(silenced) is silenced


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {"audio": True}),
        ("clip.mov", {"audio": True}),
        ("clip.mp4", {"audio": True, "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("clip.mkv", {"audio": True}),
        ("clip.webm", {"audio": "libopus", "codec": "libvpx"}),
        ("clip.ts", {"audio": True}),
    ],
)
def test_audio_read_after_the_frames_is_that_of_a_file_opened_for_it_alone(
    make_video: MakeVideo, name: str, options: dict[str, object]
) -> None:
    path = make_video(name, num_frames=20, **options)
    _, after_frames = PROCESSOR.process_video(path)
    alone = PROCESSOR.process_audio(path)
    assert after_frames is not None
    assert after_frames.duration_seconds == alone.duration_seconds
    assert torch.equal(after_frames.values, alone.values)
