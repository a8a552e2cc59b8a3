"""The errors that bad input causes.

Every message says what is wrong, where (path, key or sample id) and what to do about it. Programming errors stay
`ValueError`, `TypeError` and the like.
"""

from __future__ import annotations

import os

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
]


# Of a file, in messages: longer than the longest that file systems know for one part of a path.
_MAX_NAME = 400


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
