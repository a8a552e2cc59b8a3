"""The names that configs give to processors, and the functions that read files with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import video_llama.processor
from tests.conftest import MakeAudio, MakeVideo
from video_llama import VideoLlamaProcessor
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.constants import DEFAULT_NUM_FRAMES
from video_llama.errors import CheckpointError, ConfigError, MediaError
from video_llama.processor.builders import load_processor, process_audio, process_images, process_video
from video_llama.processor.media_processor import MediaProcessor
from video_llama.registry import PROCESSORS

PROCESSOR = MediaProcessor(image_size=20, num_frames=3, num_audio_segments=2)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("alpro_video_eval", {}, MediaProcessor()),
        ("alpro_video_eval", {"n_frms": 32, "image_size": 112}, MediaProcessor(num_frames=32, image_size=112)),
        ("alpro_video_train", {}, MediaProcessor(sampling="headtail", crop_scale=(0.5, 1.0))),
        (
            "alpro_video_train",
            {"n_frms": 4, "sampling": "uniform", "min_scale": 0.2, "max_scale": 0.9},
            MediaProcessor(num_frames=4, crop_scale=(0.2, 0.9)),
        ),
        ("blip2_image_eval", {"image_size": 448}, MediaProcessor(image_size=448)),
        ("blip2_image_train", {"min_scale": 0.4}, MediaProcessor(crop_scale=(0.4, 1.0))),
    ],
)
def test_each_name_builds_its_processor(name: str, settings: dict[str, Any], expected: MediaProcessor) -> None:
    assert name in PROCESSORS.names()
    assert PROCESSORS.build(name, **settings) == expected
    assert load_processor(name, **settings) == expected


def test_the_processor_without_a_name_is_the_one_for_use() -> None:
    assert load_processor() == MediaProcessor(num_frames=DEFAULT_NUM_FRAMES)


def test_null_in_a_config_means_the_default() -> None:
    assert load_processor("blip2_image_eval", mean=None, std=None) == MediaProcessor()


def test_any_field_of_the_processor_is_a_setting() -> None:
    processor = load_processor(mean=[0, 0, 0], num_audio_segments=3, log_mel={"num_mel_bins": 64})
    assert (processor.mean, processor.num_audio_segments, processor.log_mel.num_mel_bins) == ((0.0, 0.0, 0.0), 3, 64)


@pytest.mark.parametrize("name", ["alpro_video_eval", "alpro_video_train", "blip2_image_eval", "blip2_image_train"])
def test_unknown_settings_are_an_error_that_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ConfigError, match="unknown settings of a media processor: blur, imagesize; known: allow_urls, crop"
    ):
        load_processor(name, imagesize=224, blur=1)


def test_a_saved_folder_has_its_own_processor(tmp_path: Path) -> None:
    folder = PACKAGED_MODELS / "video-llama-tiny"
    expected = VideoLlamaProcessor.from_pretrained(folder).media_processor
    assert load_processor(folder) == load_processor(str(folder)) == expected
    assert load_processor(folder, num_frames=3) == replace(expected, num_frames=3)
    with pytest.raises(ConfigError, match="unknown settings of a media processor: n_frms"):
        load_processor(folder, n_frms=3)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"must hold what save_pretrained"):
        load_processor(tmp_path)


def test_an_unknown_name_and_a_text_processor_are_errors() -> None:
    with pytest.raises(ConfigError, match="did you mean 'alpro_video_eval'"):
        load_processor("alpro_video_evl")
    with pytest.raises(ConfigError, match="'blip_caption' is a processor of text, not of media"):
        load_processor("blip_caption")


def test_a_video_is_processed_onto_a_device(make_video: MakeVideo) -> None:
    path = make_video(num_frames=6, audio=True)
    expected, expected_sound = PROCESSOR.process_video(path)
    frames, sound = process_video(path, PROCESSOR)
    assert sound is not None
    assert expected_sound is not None
    assert torch.equal(frames.pixel_values, expected.pixel_values)
    assert torch.equal(sound.values, expected_sound.values)
    frames, sound = process_video(path, PROCESSOR, "meta", num_frames=2)
    assert sound is not None
    assert (frames.pixel_values.device.type, sound.values.device.type) == ("meta", "meta")
    assert len(frames.pixel_values) == 2
    assert process_video(path, PROCESSOR, audio=False)[1] is None
    assert process_video(make_video("silent.mp4"), PROCESSOR)[1] is None


def test_one_image_gives_one_result_and_a_list_gives_a_list(tmp_path: Any) -> None:
    image, path = Image.new("RGB", (9, 9), (200, 0, 0)), tmp_path / "still.png"
    image.save(path)
    expected = PROCESSOR.process_image(image).pixel_values
    for source in (image, path, str(path)):
        still = process_images(source, PROCESSOR)
        assert not isinstance(still, list)
        assert torch.equal(still.pixel_values, expected)
    stills = process_images([image, path], PROCESSOR, torch.device("meta"))
    assert isinstance(stills, list)
    assert [still.pixel_values.device.type for still in stills] == ["meta", "meta"]
    assert process_images([], PROCESSOR) == []


def test_a_sound_is_processed_onto_a_device(make_audio: MakeAudio) -> None:
    path = make_audio()
    expected = PROCESSOR.process_audio(path)
    assert torch.equal(process_audio(path, PROCESSOR).values, expected.values)
    assert process_audio((torch.zeros(16_000), 16_000), PROCESSOR, "meta").values.device.type == "meta"


def test_the_package_offers_the_public_names_and_no_other() -> None:
    for name in video_llama.processor.__all__:
        assert getattr(video_llama.processor, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'process_film'"):
        _ = video_llama.processor.process_film


@pytest.mark.parametrize("wrong", [(n for n in range(2)), 7, None, object()])
def test_what_no_image_can_be_read_from_is_an_error_that_says_what_can(wrong: Any) -> None:
    with pytest.raises(MediaError, match=r"no image can be read from that \(give a path, a PIL image or an array"):
        process_images(wrong, PROCESSOR)


def test_a_device_that_is_not_there_is_an_error_in_words(make_video: MakeVideo) -> None:
    with pytest.raises(ConfigError, match="device cuda:77 is not available"):
        process_video(make_video(), PROCESSOR, "cuda:77")
