"""The errors that bad input causes.

Every message says what is wrong, where (path, key or sample id) and what to do about it. Programming errors stay
`ValueError`, `TypeError` and the like.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DeviceError",
    "MediaError",
    "MessagesError",
    "NoAudioTrackError",
    "OutOfMemoryError",
    "VideoLlamaError",
    "in_line",
    "shown",
    "translate_foreign",
]


# Of a file, in messages: longer than the longest that file systems know for one part of a path.
_MAX_NAME = 400
# Of what another library says, in messages.
_MAX_REASON = 300


class VideoLlamaError(Exception):
    """Base of every error that bad input causes; the command lines print it as one line."""


class MediaError(VideoLlamaError):
    """A video, image or audio file that cannot be used.

    Args:
        path: the file (or a short description of the in-memory object).
        reason: what is wrong with it, in a few words.
        hint: what the user can do, if known.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, hint: str = "") -> None:
        # Text that was passed for a path can be a whole file's worth.
        self.path = _shortened(os.fspath(path))
        self.reason = reason
        self.hint = hint
        super().__init__(f"{self.path}: {reason}" + (f" ({hint})" if hint else ""))

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str, str]]:
        # Exceptions pickle by their args, here the joined message; decode workers send these errors back.
        return type(self), (self.path, self.reason, self.hint)


def _shortened(name: str) -> str:
    if len(name) <= _MAX_NAME:
        return name
    return f"{name[: _MAX_NAME // 2]}…{name[-_MAX_NAME // 4 :]}"


class NoAudioTrackError(MediaError):
    """The file is readable but has no audio track."""


class CheckpointError(VideoLlamaError):
    """Weights that are missing, damaged, of the wrong shape, or unsafe to read."""


class ConfigError(VideoLlamaError):
    """A configuration file or option with an unknown key, a wrong type or a contradiction."""


class DatasetError(VideoLlamaError):
    """Annotations or samples that do not have the documented form."""


class OutOfMemoryError(VideoLlamaError):
    """A device has too little free memory for the request; less at a time may fit."""


class DeviceError(VideoLlamaError):
    """A device that failed for good: this process can compute nothing more there."""


class MessagesError(DatasetError, ValueError):
    """Chat messages that do not have the documented form: a bad sample in training, a bad argument elsewhere."""


def in_line(value: object) -> str:
    """Return what a file holds for a message of one line: without line breaks, and not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "…"


def shown(value: object) -> str:
    """Return a value as Python writes it, for a message of one line."""
    return in_line(repr(value))


@contextmanager
def translate_foreign(
    kind: Callable[[str], VideoLlamaError], where: object, advice: str = "download it again"
) -> Iterator[None]:
    """Turn whatever another library raises while it reads something a user gave into an error that says where.

    Libraries raise every class there is on damaged files: the tokenizers library bare `Exception`, json
    `RecursionError`, transformers `AttributeError`. So this is for calls into them alone, never for our own code,
    whose faults must keep their names.

    Args:
        kind: the class of the error.
        where: the file, or a few words on what is read.
        advice: what to do about it.

    Raises:
        VideoLlamaError: of `kind`; an error that is ours already passes through.
    """
    try:
        yield
    except (VideoLlamaError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        # Libraries in Rust panic with an error that is no `Exception`.
        raise kind(f"{where}: {_reason(error)}; {advice}") from error


def _reason(error: BaseException) -> str:
    """Return in one line what another library says."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, (MemoryError, RecursionError)):
        return "not usable: reading it takes more memory than there is, or it is nested too deeply"
    return f"damaged or cut off, or not what is expected here ({type(error).__name__}: {in_line(error)})"
