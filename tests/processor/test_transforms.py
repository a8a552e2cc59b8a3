"""Normalisation, and the random crops of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from video_llama.processor.transforms import (
    normalize_frames,
    random_crop_frames,
    random_crop_image,
    random_source,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def gradient(height: int = 40, width: int = 40) -> NDArray[np.uint8]:
    """(height, width, 3): red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 250, width)[None]
    pixels[..., 1] = np.linspace(0, 250, height)[:, None]
    return pixels


def test_each_channel_is_scaled_to_one_then_shifted_and_divided() -> None:
    frames = np.array([[[[0, 51, 255]]], [[[255, 102, 0]]]], dtype=np.uint8)  # (frames, height, width, 3)
    values = normalize_frames(frames, (0.0, 0.2, 0.5), (1.0, 0.5, 0.25))
    expected = torch.tensor([[0.0, 0.0, 2.0], [1.0, 0.4, -2.0]]).view(2, 3, 1, 1)
    torch.testing.assert_close(values, expected)


def test_channels_come_first_and_rows_stay_rows() -> None:
    values = normalize_frames(gradient(4, 6)[None], (0.0,) * 3, (1.0,) * 3)
    assert values.shape == (1, 3, 4, 6)
    assert values.is_contiguous()
    assert values[0, 0, 0].diff().gt(0).all()
    assert values[0, 1, :, 0].diff().gt(0).all()
    assert values[0, 2].eq(0).all()


def test_the_pixels_are_not_shared_with_the_result() -> None:
    frames = gradient(4, 4)[None]
    before = frames.copy()
    normalize_frames(frames, (0.5,) * 3, (0.5,) * 3).zero_()
    np.testing.assert_array_equal(frames, before)


def test_all_frames_are_cut_alike() -> None:
    frames = np.stack([gradient(), gradient(), gradient()])
    cropped = random_crop_frames(frames, 16, (0.3, 0.6))
    assert (cropped.shape, cropped.dtype) == ((3, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(cropped[0], cropped[1])
    np.testing.assert_array_equal(cropped[0], cropped[2])


def test_a_crop_keeps_a_share_of_the_area_within_the_scale() -> None:
    for _ in range(20):
        (cropped,) = random_crop_frames(gradient()[None], 40, (0.25, 0.5)).astype(int)
        width = (cropped[20, -1, 0] - cropped[20, 0, 0]) / 250
        height = (cropped[-1, 20, 1] - cropped[0, 20, 1]) / 250
        assert 0.15 < width * height < 0.6


def test_the_whole_of_a_square_frame_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("video_llama.processor.transforms._ASPECT_RATIOS", (1.0, 1.0))
    np.testing.assert_array_equal(random_crop_frames(gradient()[None], 40, (1.0, 1.0))[0], gradient())


def test_crops_do_not_wrap_around_at_hard_edges() -> None:
    """The original's bicubic overshoots past 255 and below 0 come out at the other end of a byte."""
    frame = np.zeros((8, 8, 3), dtype=np.uint8)
    frame[:, 4:] = 255
    (enlarged,) = random_crop_frames(frame[None], 64, (1.0, 1.0))
    row = enlarged[32, :, 0].astype(int)
    assert (np.diff(row) >= -1).all()
    assert (row.min(), row.max()) == (0, 255)


def test_images_are_cut_and_mirrored_every_other_time() -> None:
    image, mirrored = Image.fromarray(gradient()), []
    for _ in range(40):
        pixels = random_crop_image(image, 16, (0.5, 1.0)).astype(int)
        assert pixels.shape == (16, 16, 3)
        assert pixels[-1, 8, 1] > pixels[0, 8, 1]  # never upside down
        mirrored.append(pixels[8, 0, 0] > pixels[8, -1, 0])
    assert 8 < sum(mirrored) < 32


def test_the_same_seed_gives_the_same_crops_and_another_seed_others() -> None:
    def crops(seed: int) -> tuple[bytes, bytes, float]:
        torch.manual_seed(seed)
        image = random_crop_image(Image.fromarray(gradient()), 16, (0.2, 0.9))
        frames = random_crop_frames(gradient()[None], 16, (0.2, 0.9))
        return image.tobytes(), frames.tobytes(), random_source().random()

    first, again, other = crops(1), crops(1), crops(2)
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))


def test_restoring_torchs_generator_gives_the_same_draws_again() -> None:
    state = torch.get_rng_state()
    first = (random_source().random(), random_source().random())
    torch.set_rng_state(state)
    assert (random_source().random(), random_source().random()) == first
    assert first[0] != first[1]
