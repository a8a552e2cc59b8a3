"""What an ablation takes away, and the files that are encoded once more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.tiny_world.evaluation.reencoding import reencode
from tests.conftest import MakeAudio, MakeVideo
from video_llama.errors import ConfigError
from video_llama.evaluation.ablation import apply_to_media, apply_to_model
from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames


def frames(number: int) -> VideoFrames:
    pixels = torch.arange(8.0)[:, None, None, None].expand(8, 3, 2, 2) + 100 * number
    return VideoFrames(pixels, "video", [], [], str(number), np.zeros((8, 2, 2, 3), np.uint8))


def sound(number: int) -> AudioSegments:
    return AudioSegments(torch.tensor([-3.0, number]).expand(1, 1, 2, 2), [0.0], 2.0, str(number))


def test_shuffled_frames_are_the_same_frames_in_another_order() -> None:
    (shuffled, _), _ = apply_to_media("shuffle_frames", [(frames(0), None), (None, sound(1))])
    assert shuffled is not None
    order = shuffled.pixel_values[:, 0, 0, 0].tolist()
    assert order != sorted(order)
    assert sorted(order) == list(range(8))


def test_swapped_sounds_all_change_places_and_the_silent_stay_silent() -> None:
    items = [(frames(0), sound(0)), (frames(1), None), (frames(2), sound(2)), (None, sound(3))]
    swapped = apply_to_media("swap_audio", items)
    sources = [None if heard is None else heard.source for _, heard in swapped]
    assert sources[1] is None
    assert sorted(source for source in sources if source) == ["0", "2", "3"]
    assert all(source != str(number) for number, source in enumerate(sources))
    assert [seen for seen, _ in swapped] == [seen for seen, _ in items]


def test_without_sound_a_video_is_only_seen_and_a_sound_file_is_flat() -> None:
    (_, heard), (_, alone) = apply_to_media("audio", [(frames(0), sound(0)), (None, sound(1))])
    assert heard is None
    assert alone is not None
    assert alone.values.unique().tolist() == [-3.0]


def test_an_ablation_of_the_model_leaves_the_media_alone() -> None:
    items = [(frames(0), sound(0))]
    assert apply_to_media("video_qformer", items) == items == apply_to_media(None, items)


def test_an_unknown_ablation_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="swap_audio"):
        apply_to_model("eyes", None)  # type: ignore[arg-type]


def test_a_clip_encoded_anew_shows_and_sounds_the_same(make_video: MakeVideo, tmp_path: Path) -> None:
    source = make_video("old.mp4", audio=True)
    target = reencode(source, "video", tmp_path / "new")
    assert target.read_bytes() != source.read_bytes()
    processor = MediaProcessor(image_size=32, num_frames=4)
    (old, old_sound), (new, new_sound) = processor.process_video(source), processor.process_video(target)
    assert new.times_seconds == old.times_seconds
    assert np.abs(new.frames.astype(int) - old.frames).mean() < 4
    assert old_sound is not None
    assert new_sound is not None
    assert new_sound.duration_seconds == pytest.approx(old_sound.duration_seconds, abs=0.1)


@pytest.mark.parametrize(("name", "codec"), [("old.wav", "pcm_s16le"), ("old.m4a", "aac")])
def test_a_sound_encoded_anew_is_as_long(make_audio: MakeAudio, tmp_path: Path, name: str, codec: str) -> None:
    target = reencode(make_audio(name, seconds=1.5, codec=codec), "audio", tmp_path / "new")
    assert MediaProcessor().process_audio(target).duration_seconds == pytest.approx(1.5, abs=0.1)


def test_a_picture_encoded_anew_has_the_same_pixels_nearly(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "old.png")
    with Image.open(reencode(tmp_path / "old.png", "image", tmp_path / "new")) as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.asarray(picture).astype(int) - (200, 40, 40)).max() < 6
