"""Images and videos that are in memory, as 8-bit RGB: any usual order of dimensions, type and range of values.

What could mean two things is refused, with the reason: a guess would show the model another image than the user has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from video_llama.errors import MediaError
from video_llama.media.sources import is_file

__all__ = ["FramesInMemory", "choose_scale", "image_of_array", "is_array", "to_array"]

Scale = Callable[[NDArray[Any]], NDArray[np.uint8]]
"""Values as given -> 0 to 255."""

_CHANNELS = (1, 3, 4)
_GIVE_FRAMES = "give (frames, height, width, 3) of uint8"
_GIVE_IMAGE = "give (height, width, 3) of uint8"
_NO_VIDEO = f"give a file, bytes, a list of PIL images, or an array: {_GIVE_FRAMES[5:]}"
_GIVE_BYTES = "give uint8 from 0 to 255"
# A -1 to 1 image that hardly goes below 0 cannot be told from a 0 to 1 image that resampling took a little too far.
_LEAST_OF_SIGNED = -0.2
# A 0 to 255 image that is darker is as good as black; a 0 to 1 image is never so far off.
_LEAST_OF_255 = 4
# Resampling overshoots by some percent of the range.
_OVERSHOOT = 51


def is_array(value: Any) -> bool:
    """Whether this is an array: of numpy, a tensor of torch, or of another library that numpy reads."""
    return isinstance(value, np.ndarray) or (hasattr(value, "__array__") and hasattr(value, "shape"))


def to_array(value: Any, name: str) -> NDArray[Any]:
    """Return an array of numpy; tensors may be on any device and in bfloat16.

    Raises:
        MediaError: one that has no values, or values that are no numbers.
    """
    try:
        # Numpy cannot ask for these of a tensor by itself.
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if "bfloat16" in str(value.dtype):
                value = value.float()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(name, f"{type(value).__name__} cannot be read as an array: {error}") from error
    if array.dtype.kind not in "buif":
        raise MediaError(name, f"an array of shape {array.shape} and type {array.dtype}", "give real numbers")
    return array


def choose_scale(array: NDArray[Any], name: str) -> Scale:
    """Return what brings the values to 0 to 255, by their type and their range.

    Raises:
        MediaError: NaN, a range that no image has, or one that two kinds of images have.
    """
    if array.dtype == np.uint8:
        return lambda values: values
    if array.dtype == bool:
        return lambda values: values.astype(np.uint8) * np.uint8(255)
    low, high = float(array.min()), float(array.max())
    if array.dtype.kind == "f":
        return _scale_of_floats(low, high, name)
    given = f"{array.dtype} values from {low:.0f} to {high:.0f}"
    if low < 0 or high > 65_535:
        raise MediaError(name, f"{given}, where an image has 0 to 255 or 0 to 65535", _GIVE_BYTES)
    if array.dtype == np.uint16 and 0 < high <= 255:
        hint = "give uint8, or scale 16 bits to 0 to 65535"
        raise MediaError(name, f"{given}: 8 bits in a wide type, or an almost black image of 16 bits?", hint)
    if high <= 255:
        return lambda values: values.astype(np.uint8)
    return lambda values: _round(values / 257.0)


def _scale_of_floats(low: float, high: float, name: str) -> Scale:
    given = f"floating point values from {low:.3g} to {high:.3g}"
    if not np.isfinite(low) or not np.isfinite(high):
        raise MediaError(name, "values that are not finite numbers (NaN or infinity)", "replace them before")
    if low >= 0 and high <= 1:
        return lambda values: _round(values.astype(np.float64) * 255)
    if -1 <= low < _LEAST_OF_SIGNED and high <= 1:
        return lambda values: _round((values.astype(np.float64) + 1) * 127.5)
    if low >= -_OVERSHOOT and _LEAST_OF_255 <= high <= 255 + _OVERSHOOT:
        return lambda values: _round(values.astype(np.float64))
    if low >= _LEAST_OF_SIGNED and high < _LEAST_OF_255:
        hint = "clip to 0 to 1, or " + _GIVE_BYTES
        raise MediaError(name, f"{given}: is the range 0 to 1, -1 to 1 or 0 to 255?", hint)
    hint = _GIVE_BYTES
    if low > -10 and high < 10:
        hint = "values that are normalised for the model already go to it as they are: pass them to generate"
    raise MediaError(name, f"{given}, where an image has 0 to 1, -1 to 1 or 0 to 255", hint)


def image_of_array(value: Any, name: str = "array") -> NDArray[np.uint8]:
    """Return an image in memory as (height, width, 3), RGB.

    Args:
        value: (height, width), (height, width, channels) or (channels, height, width), with 1, 3 or 4 channels; a
            first dimension of 1 is dropped. Transparency is dropped.

    Raises:
        MediaError: another shape, or values as in `choose_scale`.
    """
    array = to_array(value, "array")
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    wrong = MediaError(name, f"no image has shape {array.shape} and type {array.dtype}", _GIVE_IMAGE)
    if array.ndim == 4 and array.size:
        raise MediaError(name, f"{len(array)} images of shape {array.shape}", "give them one by one, as a list")
    if array.ndim not in (2, 3) or not array.size:
        raise wrong
    if array.ndim == 2:
        array = array[..., np.newaxis]
    elif array.shape[-1] in _CHANNELS and array.shape[0] == 3:
        raise MediaError(name, f"the shape {array.shape} has its channels first or last?", _GIVE_IMAGE)
    elif array.shape[-1] not in _CHANNELS:
        if array.shape[0] not in _CHANNELS:
            raise wrong
        array = np.moveaxis(array, 0, -1)
    return _rgb(choose_scale(array, name)(array))


class FramesInMemory:
    """The frames of a video in memory; only those that are taken are converted.

    Args:
        value: (frames, height, width, channels), (frames, channels, height, width) or (channels, frames, height,
            width), with 1, 3 or 4 channels, after a first dimension of 1 or without; a list of arrays (height, width,
            channels) of one size; or a list of PIL images or of what stands for an image file (`open_source`).

    Raises:
        MediaError: another shape, or values as in `choose_scale`.
    """

    def __init__(self, value: Any) -> None:
        self._frames: Sequence[Any] | NDArray[Any]
        self._scale: Scale | None = None
        if isinstance(value, (list, tuple)) and value and all(map(_is_image, value)):
            self._frames = value
            return
        if isinstance(value, (list, tuple)):
            value = _stack(value)
        elif not is_array(value):
            raise MediaError(type(value).__name__, "no video can be read from that", _NO_VIDEO)
        array = to_array(value, "array")
        if array.ndim == 5 and len(array) == 1:
            array = array[0]
        self._frames = _frames_first(array)
        self._scale = choose_scale(array, "array")

    def __len__(self) -> int:
        return len(self._frames)

    def take(self, indices: Sequence[int]) -> list[Any]:
        """Return some frames as (height, width, 3), uint8, RGB, or as images of PIL or files as they were given."""
        if self._scale is None:
            return [self._frames[index] for index in indices]
        return [_rgb(self._scale(self._frames[index])) for index in indices]


def _is_image(item: Any) -> bool:
    return isinstance(item, Image.Image) or is_file(item)


def _stack(items: Sequence[Any]) -> NDArray[Any]:
    if not items or not all(map(is_array, items)):
        kinds = ", ".join(sorted({type(item).__name__ for item in items})) or "nothing"
        raise MediaError(
            "frames", f"a list of {kinds}", "give a list of arrays (height, width, 3), of PIL images or of files"
        )
    arrays = [to_array(item, "frames") for item in items]
    if len({array.shape for array in arrays}) > 1:
        raise MediaError("frames", "frames of several shapes", "a video has frames of one size; resize them")
    return np.stack(arrays)


def _frames_first(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view (frames, height, width, channels)."""
    if array.ndim != 4 or not array.size:
        raise MediaError("array", f"no video has shape {array.shape} and type {array.dtype}", _GIVE_FRAMES)
    _, second, _, last = array.shape
    if last in _CHANNELS and second == 3:
        raise MediaError("array", f"the shape {array.shape} has its channels second or last?", _GIVE_FRAMES)
    if last in _CHANNELS:
        return array
    if second in _CHANNELS:
        return np.moveaxis(array, 1, -1)
    if array.shape[0] in _CHANNELS:
        return np.moveaxis(array, 0, -1)
    raise MediaError("array", f"no video has shape {array.shape} and type {array.dtype}", _GIVE_FRAMES)


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width, 1, 3 or 4) -> (height, width, 3)."""
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return np.ascontiguousarray(image[..., :3])


def _round(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
