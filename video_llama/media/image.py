"""Still images to RGB, whatever their mode, depth and orientation."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from video_llama.errors import MediaError
from video_llama.media.containers import check_media_file, describe_content

__all__ = ["ImageInput", "load_image", "resize_image"]

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.generic]
"""A file, a PIL image, or an array (height, width[, channels])."""

# A small file can unpack to far more and fill the memory.
_MAX_PIXELS = 100_000_000


def load_image(source: ImageInput) -> Image.Image:
    """An image as 8-bit RGB, upright.

    Transparency is dropped as in the reference, not painted over a background. 16-bit images are scaled to
    8 bits, not clipped. The camera's orientation tag is obeyed. Of an animation the first picture is taken.

    Raises:
        MediaError: no such file, no image, truncated, too large to unpack, or an object of another kind.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(source))
    if isinstance(source, np.ndarray):
        return _to_rgb(_array_to_image(source))
    if not isinstance(source, (str, os.PathLike)):
        hint = "give a path, a PIL image or an array (height, width, 3); of bytes, PIL.Image.open(io.BytesIO(data))"
        raise MediaError(type(source).__name__, "no image can be read from that", hint)
    name = check_media_file(source)
    try:
        with Image.open(name) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise MediaError(source, f"{image.width}x{image.height} pixels are too many", "make it smaller")
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        content = describe_content(name)
        raise MediaError(source, f"not an image but {content}" if content else "not an image") from error
    except Image.DecompressionBombError as error:
        raise MediaError(source, "it would unpack to too many pixels", "make it smaller") from error
    # What PIL's decoders raise on damaged files: OSError for truncation, the others from the parsers of
    # headers.
    except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:
        raise MediaError(source, f"the image is truncated or damaged: {error}") from error


def resize_image(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Squash to a square, bicubic with antialiasing: (size, size, 3), uint8; the aspect ratio is not kept."""
    # Rows and columns are resized one after the other, and the first result is rounded, so the order shows.
    # Pillow 13 takes the columns first where an image loses far more height than width, Pillow 12 never.
    # The reference data was recorded with 13; this gives its pixels with either.
    if image.height - size > 2 * max(image.width - size, 0):
        image = image.resize((image.width, size), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _to_rgb(image: Image.Image) -> Image.Image:
    # 16 bits, also where PIL holds them in 32.
    if image.mode.startswith("I"):
        return _gray(np.asarray(image, dtype=np.float64) / 257)
    if image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        return _gray(values * 255 if np.max(values, initial=0) <= 1 else values)
    return image.convert("RGB")


def _gray(values: NDArray[np.float64]) -> Image.Image:
    """(height, width) on the scale 0 to 255 -> RGB."""
    return Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8)).convert("RGB")


def _array_to_image(array: NDArray[np.generic]) -> Image.Image:
    error = MediaError(
        "array", f"no image has shape {array.shape} and type {array.dtype}", "give (height, width, 3) of uint8"
    )
    # PIL takes one dimension for a column.
    if array.ndim < 2 or not array.size:
        raise error
    try:
        return Image.fromarray(array)
    except (TypeError, KeyError) as cause:
        raise error from cause
