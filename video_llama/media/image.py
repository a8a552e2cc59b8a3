"""Still images to RGB, whatever their mode, depth and orientation."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from video_llama.errors import MediaError
from video_llama.media.containers import check_media_file, describe_content, find_truncation
from video_llama.media.pixels import image_of_array, is_array
from video_llama.media.reasons import describe_error
from video_llama.media.signatures import PILLOW_ERRORS
from video_llama.media.sources import is_file, open_source
from video_llama.utils.extras import how_to_install, import_extra, is_installed

__all__ = ["ImageInput", "load_image", "open_image", "read_image", "resize_image", "to_rgb", "translate_image_errors"]

logger = logging.getLogger(__name__)

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.generic]
"""A file, a PIL image, or an array (height, width[, channels])."""

# A small file can unpack to far more and fill the memory.
_MAX_PIXELS = 100_000_000

_CONVERT = "convert it to PNG or JPEG"
_BITS_PER_SAMPLE = 258  # tag of TIFF
# Formats whose further images are of the same rank as the first. (Those of a PSD file are layers, and so on.)
_PAGED_FORMATS = {"DCX", "GIF", "IM", "PNG", "TIFF", "WEBP"}


def load_image(source: ImageInput) -> Image.Image:
    """An image as 8-bit RGB, upright.

    Transparency is dropped as in the reference, not painted over a background. 16-bit images are scaled to
    8 bits, not clipped. The camera's orientation tag is obeyed. Of several pages or frames the first is taken, with
    a warning.

    Raises:
        MediaError: no such file, no image, truncated, too large to unpack, or an object of another kind.
    """
    if isinstance(source, Image.Image):
        return _from_memory(source)
    if is_array(source):
        return Image.fromarray(image_of_array(source))
    if not isinstance(source, (str, os.PathLike)):
        hint = "give a path, a PIL image or an array (height, width, 3), or the bytes of a file"
        raise MediaError(type(source).__name__, "no image can be read from that", hint)
    with open_image(source) as image:
        num_pages = getattr(image, "n_frames", 1)
        if num_pages > 1 and image.format in _PAGED_FORMATS:
            logger.warning("%s: the first of its %d images is taken", source, num_pages)
        has_wide_integers = image.mode == "I" and getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (32,)
        upright = ImageOps.exif_transpose(image)
        if has_wide_integers:
            # Nothing says how large the values of 32 bits are, as nothing does in an array.
            return Image.fromarray(image_of_array(np.asarray(upright), os.fspath(source)))
        return to_rgb(upright, os.fspath(source))


def _from_memory(image: Image.Image) -> Image.Image:
    """Return an image of PIL as 8-bit RGB; one that was made of an array is taken as that array."""
    if not image.width or not image.height:
        raise MediaError("image", f"an image of {image.width}x{image.height} pixels")
    with translate_image_errors("image"):
        # What was read of a file says how many bits it has, and an array does not.
        if image.format is None and image.mode == "I":
            return Image.fromarray(image_of_array(np.asarray(image)))
        return to_rgb(ImageOps.exif_transpose(image))


def read_image(source: Any, allow_urls: bool = False) -> tuple[str, Image.Image]:
    """Return the name of an image and the image, as `load_image`.

    Args:
        source: what stands for a file (`open_source`), a PIL image, or an array (`image_of_array`).
        allow_urls: download http and https addresses.

    Raises:
        MediaError: as `open_source` and `load_image`.
    """
    if not is_file(source):
        return "image", load_image(source)
    with open_source(source, allow_urls) as file:
        return file.name, load_image(file.path)


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image file with Pillow: its header is read and checked, its pixels are not decoded yet.

    Raises:
        MediaError: no such file, no image, too large to unpack, or an image that a package is missing for.
    """
    name = check_media_file(path)
    # Pillow reads on while the image is used. It gets the open file: Pillow 11 follows links, and files in memory have
    # no path to follow.
    with translate_image_errors(path), open(name, "rb") as file:
        try:
            opened = Image.open(file)
        except UnidentifiedImageError as error:
            content = describe_content(name)
            if "(HEI" not in content or "HEIF" in Image.OPEN or not is_installed("pillow_heif"):
                raise _unidentified(path, content) from error
            import_extra("pillow_heif", "HEIC images").register_heif_opener()
            opened = Image.open(file)
        with opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise MediaError(path, f"{opened.width}x{opened.height} pixels are too many", "make it smaller")
            # An animation that was cut behind its first frame looks like an image.
            truncation = find_truncation(name) if opened.format == "GIF" else ""
            if truncation:
                raise MediaError(path, truncation, "copy or download it again")
            yield opened


@contextmanager
def translate_image_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what Pillow raises into `MediaError`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise MediaError(path, "it would unpack to too many pixels", "make it smaller") from error
    except PILLOW_ERRORS as error:
        reason = f"the image is truncated or damaged: {describe_error(error)}"
        raise MediaError(path, reason, "copy or download it again") from error


def _unidentified(path: str | os.PathLike[str], content: str) -> MediaError:
    """Say why Pillow does not open a file."""
    if "(HEI" in content and not is_installed("pillow_heif"):
        hint = f"{how_to_install('pillow_heif')}, or {_CONVERT}"
        return MediaError(path, f"{content}, which needs pillow-heif", hint)
    if "(AVIF" in content and "AVIF" not in Image.OPEN:
        return MediaError(path, f"{content}, which needs Pillow 11.3 or later", f"upgrade it, or {_CONVERT}")
    truncation = find_truncation(os.fspath(path))
    if "still image" in content and truncation:
        return MediaError(path, truncation, "copy or download it again")
    if "still image" in content:
        return MediaError(path, f"{content} that Pillow cannot read", _CONVERT)
    if content:
        return MediaError(path, f"not an image but {content}")
    return MediaError(path, "not an image")


def resize_image(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Squash to a square, bicubic with antialiasing: (size, size, 3), uint8; the aspect ratio is not kept."""
    # Rows and columns are resized one after the other, and the first result is rounded, so the order shows.
    # Pillow 13 takes the columns first where an image loses far more height than width, Pillow 12 never.
    # The reference data was recorded with 13; this gives its pixels with either.
    if image.height - size > 2 * max(image.width - size, 0):
        image = image.resize((image.width, size), Image.Resampling.BICUBIC)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Return an image as 8-bit RGB.

    Raises:
        MediaError: floating point values of an unknown range.
    """
    # 16 bits, also where PIL holds them in 32.
    if image.mode.startswith("I"):
        gray = np.clip(np.rint(np.asarray(image, dtype=np.float64) / 257), 0, 255)
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(image_of_array(np.asarray(image), name))
    return image.convert("RGB")
