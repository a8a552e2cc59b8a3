"""Still images of every mode, depth and orientation to RGB; recorded ones are in tests/parity/test_media_parity.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import MakeVideo
from video_llama.errors import MediaError
from video_llama.media import image as image_module
from video_llama.media.image import load_image, resize_image

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
ORIENTATION_TAG = 0x0112
TURNS = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).transpose(1, 0, 2),
    8: np.rot90,
}
"""What a viewer must do with the stored pixels for each value of the EXIF orientation tag."""


def corners() -> NDArray[np.uint8]:
    """(4, 6, 3): red top left, green top right, blue below."""
    pixels = np.empty((4, 6, 3), dtype=np.uint8)
    pixels[:2, :3], pixels[:2, 3:], pixels[2:] = RED, GREEN, BLUE
    return pixels


def pixels_of(source: Any) -> NDArray[np.uint8]:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "gif"])
def test_an_image_file_gives_its_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"still.{suffix}"
    Image.fromarray(corners()).save(path, lossless=True)
    np.testing.assert_array_equal(pixels_of(path), corners())
    np.testing.assert_array_equal(pixels_of(str(path)), corners())


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "still.mp4"
    Image.fromarray(corners()).save(path, format="PNG")
    np.testing.assert_array_equal(pixels_of(path), corners())


def test_transparency_is_dropped_as_in_the_original(tmp_path: Path) -> None:
    alpha = np.linspace(0, 255, 24).astype(np.uint8).reshape(4, 6, 1)
    path = tmp_path / "alpha.png"
    Image.fromarray(np.concatenate([corners(), alpha], axis=2)).save(path)
    np.testing.assert_array_equal(pixels_of(path), corners())


def test_gray_and_palette_and_bilevel_images_become_rgb() -> None:
    gray = np.arange(24, dtype=np.uint8).reshape(4, 6)
    np.testing.assert_array_equal(pixels_of(Image.fromarray(gray)), np.stack([gray] * 3, axis=2))
    with_alpha = Image.merge("LA", [Image.fromarray(gray), Image.new("L", (6, 4), 9)])
    np.testing.assert_array_equal(pixels_of(with_alpha), np.stack([gray] * 3, axis=2))
    palette = Image.fromarray(corners()).quantize(3)
    np.testing.assert_array_equal(pixels_of(palette), corners())
    assert pixels_of(Image.new("1", (2, 2), 1)).tolist() == [[[255] * 3] * 2] * 2


def test_printing_colours_become_rgb() -> None:
    cyan = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    assert pixels_of(cyan)[0, 0].tolist() == [0, 255, 255]
    assert pixels_of(Image.new("CMYK", (2, 2), (0, 0, 0, 255)))[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.array([[0, 257, 33_000, 65_535]], dtype=np.uint16)).save(path)
    assert pixels_of(path)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels_of(Image.open(path).convert("I"))[0, :, 2].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.4, 300.0], [0, 100, 255])]
)
def test_floating_point_images_reach_to_one_or_to_255(values: list[float], expected: list[int]) -> None:
    assert pixels_of(np.array([values], dtype=np.float32))[0, :, 1].tolist() == expected


@pytest.mark.parametrize("orientation", list(TURNS))
def test_the_cameras_orientation_is_obeyed(tmp_path: Path, orientation: int) -> None:
    path, exif = tmp_path / "turned.png", Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    Image.fromarray(corners()).save(path, exif=exif)
    expected = TURNS[orientation](corners())
    np.testing.assert_array_equal(pixels_of(path), expected)
    np.testing.assert_array_equal(pixels_of(Image.open(path)), expected)


def test_the_first_picture_of_an_animation_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    first.save(path, save_all=True, append_images=[second])
    assert pixels_of(path)[0, 0].tolist() == list(RED)


def test_arrays_are_images_of_height_width_and_channels() -> None:
    np.testing.assert_array_equal(pixels_of(corners()), corners())
    np.testing.assert_array_equal(pixels_of(corners()[..., 0])[..., 2], corners()[..., 0])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((7, 4, 5), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_an_error_that_gives_its_shape(array: NDArray[Any]) -> None:
    with pytest.raises(MediaError, match=r"array: no image has shape \(") as caught:
        load_image(array)
    assert str(array.dtype) in caught.value.reason


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_truncated_image_is_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    whole, path = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(MediaError, match=rf"cut\.{suffix}: the image is truncated or damaged"):
        load_image(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"hello\n", "not an image but a text file"), (b"\x00\x01\x02" * 99, "not an image"), (b"", "the file is empty")],
)
def test_what_is_no_image_is_an_error_that_names_file_and_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "still.png"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=cause) as caught:
        load_image(path)
    assert (caught.value.path, caught.value.reason) == (str(path), cause)


def test_a_video_is_not_an_image(make_video: MakeVideo) -> None:
    with pytest.raises(MediaError, match="not an image"):
        load_image(make_video())


def test_an_image_of_too_many_pixels_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "big.png"
    Image.new("1", (100, 101)).save(path)
    monkeypatch.setattr(image_module, "_MAX_PIXELS", 100 * 100)
    with pytest.raises(MediaError, match="100x101 pixels are too many"):
        load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(MediaError, match="too many pixels"):
        load_image(path)


@pytest.mark.parametrize("size", [(640, 30), (30, 640), (7, 5), (16, 16)])
def test_an_image_is_squashed_to_a_square(size: tuple[int, int]) -> None:
    resized = resize_image(Image.new("RGB", size, RED), 16)
    assert (resized.shape, resized.dtype) == ((16, 16, 3), np.uint8)
    assert (resized == RED).all()


def test_enlarging_is_smooth_and_shrinking_averages() -> None:
    edge = Image.fromarray(np.array([[[0] * 3, [240] * 3]] * 2, dtype=np.uint8))
    assert len(np.unique(resize_image(edge, 16))) > 4
    stripes = Image.fromarray(np.tile(np.array([[[0] * 3, [200] * 3]], dtype=np.uint8), (64, 32, 1)))
    assert np.abs(resize_image(stripes, 8).astype(int) - 100).max() <= 10


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_image(Image.fromarray(noise), 16), noise)
