"""`image_processor`, `video_processor` and `feature_extractor`: each reads its modality as the whole processor does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoVideoProcessor

from video_llama import VideoLlamaProcessor
from video_llama.checkpoints.hub import PACKAGED_MODELS
from video_llama.errors import CheckpointError, ConfigError, MediaError
from video_llama.processor.media_parts import (
    VideoLlamaFeatureExtractor,
    VideoLlamaImageProcessor,
    VideoLlamaVideoProcessor,
)

DATA = Path(__file__).parents[1] / "data/older_folders"
SAMPLES = Path(__file__).parents[2] / "video_llama/demo/samples"
VIDEO, IMAGE, AUDIO = (str(SAMPLES / name) for name in ("stars.mp4", "cross.jpg", "tone.m4a"))
AUTO = {
    "image_processor": AutoImageProcessor,
    "video_processor": AutoVideoProcessor,
    "feature_extractor": AutoFeatureExtractor,
}
SHORT = np.zeros((3, 64, 64, 3), np.uint8)
WAVE = np.sin(np.arange(48_000) / 20).astype(np.float32)


@pytest.fixture
def processor() -> VideoLlamaProcessor:
    return VideoLlamaProcessor.from_pretrained(PACKAGED_MODELS / "video-llama-tiny")


@pytest.fixture
def saved(processor: VideoLlamaProcessor, tmp_path: Path) -> Path:
    """A folder whose settings are not the defaults."""
    media = replace(processor.media_processor, num_frames=5, image_size=32, num_audio_segments=3, mean=(0.1, 0.2, 0.3))
    processor.media_processor = media
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("part", "keyword", "items", "options"),
    [
        ("image_processor", "images", IMAGE, {}),
        ("image_processor", "images", [IMAGE, SHORT[0]], {}),
        ("image_processor", "images", [[IMAGE], [SHORT[0]]], {"return_tensors": "pt"}),
        ("video_processor", "videos", VIDEO, {}),
        ("video_processor", "videos", [VIDEO, SHORT], {}),
        ("video_processor", "videos", [VIDEO], {"num_frames": 2, "return_metadata": True}),
        ("video_processor", "videos", [SHORT], {"fps": 1, "video_metadata": [{"fps": 3}]}),
        ("feature_extractor", "audios", AUDIO, {}),
        ("feature_extractor", "audios", [AUDIO, (WAVE, 24_000)], {}),
        ("feature_extractor", "audios", WAVE, {"sampling_rate": 16_000, "return_tensors": "pt"}),
    ],
)
def test_alone_it_gives_the_tensors_of_the_whole(
    saved: Path, part: str, keyword: str, items: Any, options: dict[str, Any]
) -> None:
    alone = AUTO[part].from_pretrained(saved)(items, **options)
    count = sum(len(item) if isinstance(item, list) else 1 for item in items) if isinstance(items, list) else 1
    mark = "<AudioHere>" if keyword == "audios" else "<ImageHere>"
    whole = VideoLlamaProcessor.from_pretrained(saved)(mark * count, **{keyword: items}, **options)
    assert alone.keys() == whole.keys() - {"input_ids", "attention_mask"}
    for name, value in alone.items():
        assert value == whole[name] if name == "video_metadata" else torch.equal(value, whole[name])


def test_parts_are_what_transformers_takes_for_parts(processor: VideoLlamaProcessor) -> None:
    assert processor.get_attributes() == ["tokenizer", *AUTO]
    media = processor.media_processor
    assert processor.image_processor.size == {"height": media.image_size, "width": media.image_size}
    assert processor.image_processor.image_mean == processor.video_processor.image_mean == list(media.mean)
    assert processor.image_processor.image_std == processor.video_processor.image_std == list(media.std)
    assert processor.video_processor.num_frames == media.num_frames
    assert processor.feature_extractor.sampling_rate == 16_000
    assert processor.feature_extractor.feature_size == media.log_mel.num_mel_bins


@pytest.mark.parametrize("name", AUTO)
def test_a_part_is_saved_with_the_folder_and_alone(saved: Path, tmp_path: Path, name: str) -> None:
    loaded = VideoLlamaProcessor.from_pretrained(saved)
    part = AUTO[name].from_pretrained(saved)
    assert type(part) is type(getattr(loaded, name))
    assert part.settings == getattr(loaded, name).settings
    part.save_pretrained(tmp_path / "alone")
    assert AUTO[name].from_pretrained(tmp_path / "alone").settings == part.settings
    assert type(AutoProcessor.from_pretrained(saved)) is VideoLlamaProcessor
    assert json.loads((saved / "processor_config.json").read_text()).keys() >= {name}
    key = {"feature_extractor": "num_audio_segments"}.get(name, "image_size")
    assert AUTO[name].from_pretrained(saved, **{key: 7}).settings[key] == 7


def test_folders_of_before_load_and_are_saved_anew(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PACKAGED_MODELS / "video-llama-tiny" / name, tmp_path)
    shutil.copy(DATA / "processor_config.json", tmp_path)
    before = json.loads((tmp_path / "processor_config.json").read_text())["media_processor"]
    loaded = VideoLlamaProcessor.from_pretrained(tmp_path)
    assert json.loads(json.dumps(loaded.media_processor.to_dict())) == before
    loaded.save_pretrained(tmp_path / "anew")
    assert VideoLlamaProcessor.from_pretrained(tmp_path / "anew").media_processor == loaded.media_processor


def test_another_part_changes_how_the_processor_reads(processor: VideoLlamaProcessor) -> None:
    processor.media_processor = replace(processor.media_processor, allow_urls=True)
    processor.image_processor = VideoLlamaImageProcessor(image_size=16)
    assert processor(text="<ImageHere>", videos=VIDEO)["pixel_values"].shape == (1, 8, 3, 16, 16)
    processor.feature_extractor = VideoLlamaFeatureExtractor(num_audio_segments=2)
    assert processor(text="<AudioHere>", audio=AUDIO)["audio_values"].shape == (1, 2, 1, 128, 204)
    # What a user allowed stays, and no folder says it.
    assert processor.media_processor.allow_urls
    assert "allow_urls" not in processor.to_json_string()
    with pytest.raises(AttributeError):
        processor.image_processor.size = {"height": 8, "width": 8}


def test_given_settings_replace_saved_ones(saved: Path) -> None:
    video = VideoLlamaVideoProcessor(num_frames=2, image_size=32, mean=(0.1, 0.2, 0.3))
    assert VideoLlamaProcessor.from_pretrained(saved, video_processor=video).media_processor.num_frames == 2
    media = replace(VideoLlamaProcessor.from_pretrained(saved).media_processor, num_frames=6)
    assert VideoLlamaProcessor.from_pretrained(saved, media_processor=media).media_processor == media


def test_a_folder_without_settings_says_so(processor: VideoLlamaProcessor, tmp_path: Path) -> None:
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no processor_config\.json"):
        VideoLlamaProcessor.from_pretrained(tmp_path)


def test_what_cannot_be_is_refused(processor: VideoLlamaProcessor, saved: Path) -> None:
    with pytest.raises(ConfigError, match="one image_size, not 32 and 64"):
        VideoLlamaProcessor.from_pretrained(saved, video_processor={"image_size": 64, "mean": [0.1, 0.2, 0.3]})
    with pytest.raises(TypeError, match="must be a VideoLlamaImageProcessor"):
        processor.image_processor = processor.video_processor
    with pytest.raises(ConfigError, match="VideoLlamaImageProcessor has no num_frames; it has image_size"):
        VideoLlamaImageProcessor(num_frames=3)
    with pytest.raises(ConfigError, match="num_frames must be a whole number"):
        VideoLlamaVideoProcessor(num_frames=0)
    with pytest.raises(TypeError, match=r"unknown keyword.*do_resize"):
        processor.image_processor(IMAGE, do_resize=False)
    with pytest.raises(ValueError, match="'pt', 'np' or None, not 'tf'"):
        processor.image_processor(IMAGE, return_tensors="tf")
    with pytest.raises(MediaError):
        processor.feature_extractor(IMAGE)
    with pytest.raises(ConfigError, match="more entries"):
        processor.video_processor(SHORT, video_metadata=[{"fps": 1}, {"fps": 1}])


@pytest.mark.parametrize("is_older", [False, True])
def test_a_setting_of_a_part_is_one_of_the_whole_when_it_is_loaded(is_older: bool, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    if is_older:
        shutil.copy(DATA / "processor_config.json", tmp_path)
    before = VideoLlamaProcessor.from_pretrained(tmp_path).media_processor
    changed = {"num_frames": 3, "num_audio_segments": 2}
    loaded = VideoLlamaProcessor.from_pretrained(tmp_path, **changed)
    assert loaded.media_processor == replace(before, **changed)
    assert loaded.video_processor.num_frames == 3
    with pytest.raises(ConfigError, match="num_frames must be"):
        VideoLlamaProcessor.from_pretrained(tmp_path, num_frames=0)
