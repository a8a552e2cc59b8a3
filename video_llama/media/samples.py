"""Audio that is in memory, in the forms that other packages give it: arrays with their rate, pairs and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_llama.errors import MediaError
from video_llama.media.pixels import is_array, to_array

__all__ = ["PLAUSIBLE_RATES_HZ", "samples_of"]

PLAUSIBLE_RATES_HZ = range(1_000, 1_000_001)

_NAME = "sound"
_FORMS = "give (samples, rate in hertz) or {'array': samples, 'sampling_rate': rate}"
_RATE_KEYS = ("sampling_rate", "sample_rate")
_SAMPLE_KEYS = ("array", "raw")
# More are samples that stand where channels should.
_MAX_CHANNELS = 64
# Ten times full scale: louder floats are 16-bit numbers that nobody has divided.
_LOUDEST = 10.0
_FULL_SCALE = ("int16", "int32", "uint8")


def samples_of(sound: Any) -> tuple[NDArray[Any], int]:
    """Return samples (channels, samples) and their rate in hertz.

    Args:
        sound: (samples, rate), (rate, samples) as Gradio and scipy have it, or the mapping of HF datasets. Samples are
            (samples,), (channels, samples) or (samples, channels), floating point from -1 to 1, int16, int32, or
            uint8 around 128.

    Returns:
        samples as float, int16 or int32; uint8 becomes float.

    Raises:
        MediaError: another form, no rate, an impossible rate, or samples of another type, shape or range.
    """
    values, rate = _split(sound)
    samples = _channels_first(_check_type(values))
    rate_hz = _check_rate(rate)
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    if samples.dtype.kind == "f":
        if not np.isfinite(samples).all():
            raise MediaError(_NAME, "samples that are not finite numbers (NaN or infinity)", "replace them before")
        loudest = float(np.abs(samples).max())
        if loudest > _LOUDEST:
            hint = "scale them to -1 to 1: 16-bit samples are divided by 32768"
            raise MediaError(_NAME, f"floating point samples as large as {loudest:.4g}", hint)
    return samples, rate_hz


def _split(sound: Any) -> tuple[Any, Any]:
    """Return samples and rate."""
    if isinstance(sound, Mapping):
        rate = next((sound[key] for key in _RATE_KEYS if key in sound), None)
        values = next((sound[key] for key in _SAMPLE_KEYS if key in sound), None)
        if values is None or rate is None:
            raise MediaError(_NAME, f"a mapping with {', '.join(map(str, list(sound)[:8])) or 'nothing'}", _FORMS)
        return values, rate
    if is_array(sound):
        raise MediaError(_NAME, "samples without their rate", _FORMS)
    if not isinstance(sound, (tuple, list)) or len(sound) != 2:
        raise MediaError(_NAME, f"no audio can be read from {type(sound).__name__}", f"give a file, or {_FORMS[5:]}")
    first, second = sound
    if _is_scalar(first) and not _is_scalar(second):
        return second, first
    return first, second


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) or (is_array(value) and tuple(value.shape) == ())


def _check_rate(rate: Any) -> int:
    try:
        number = float(rate)
    except (TypeError, ValueError) as error:
        raise MediaError(_NAME, f"a rate of type {type(rate).__name__}", _FORMS) from error
    if isinstance(rate, bool) or not number.is_integer() or int(number) not in PLAUSIBLE_RATES_HZ:
        reason = f"a rate of {number:g} samples per second"
        raise MediaError(_NAME, reason, f"rates are whole numbers from {PLAUSIBLE_RATES_HZ[0]} to 1000000 hertz")
    return int(number)


def _check_type(values: Any) -> NDArray[Any]:
    if isinstance(values, (str, bytes)) or not (is_array(values) or isinstance(values, (list, tuple))):
        raise MediaError(_NAME, f"samples of type {type(values).__name__}", _FORMS)
    samples = to_array(values, _NAME)
    if samples.dtype.kind != "f" and samples.dtype.name not in _FULL_SCALE:
        hint = "give float32 from -1 to 1, int16, int32 or uint8: the loudest value of others is not known"
        raise MediaError(_NAME, f"samples of type {samples.dtype}", hint)
    return samples


def _channels_first(samples: NDArray[Any]) -> NDArray[Any]:
    """Return (channels, samples): a sound has fewer channels than samples."""
    if samples.ndim == 3 and len(samples) == 1:
        samples = samples[0]
    wrong = MediaError(_NAME, f"samples of shape {samples.shape}", "give (samples,) or (channels, samples)")
    if samples.ndim not in (1, 2) or not samples.size:
        raise wrong
    if samples.ndim == 1:
        return samples[np.newaxis]
    rows, columns = samples.shape
    if min(rows, columns) > _MAX_CHANNELS or rows == columns > 1:
        raise wrong
    if columns < rows:
        samples = samples.T
    return samples
