"""The errors a user can cause, one small family.

Every message says what was wrong, where (path, key or sample id) and what to do about it.
Programming errors stay `ValueError`, `TypeError` and friends: they must stop a run, never be
caught as bad input.
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


class VideoLlamaError(Exception):
    """Base of every error that bad input causes; the command lines print it as one line."""


class MediaError(VideoLlamaError):
    """A video, image or sound file that cannot be used.

    Args:
        path: the file (or a short description of the in-memory object).
        reason: what is wrong with it, in a few words.
        hint: what the user can do, if anything is known to help.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, hint: str = "") -> None:
        self.path = os.fspath(path)
        self.reason = reason
        self.hint = hint
        super().__init__(f"{self.path}: {reason}" + (f" ({hint})" if hint else ""))

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str, str]]:
        # Exceptions pickle by their args (the joined message) unless told otherwise; decode workers send these back.
        return type(self), (self.path, self.reason, self.hint)


class NoAudioTrackError(MediaError):
    """The file is readable but has no sound track: not the same as one that cannot be decoded."""


class CheckpointError(VideoLlamaError):
    """Weights that are missing, damaged, of the wrong shape, or unsafe to read."""


class ConfigError(VideoLlamaError):
    """A configuration file or option with an unknown key, a wrong type or a contradiction."""


class DatasetError(VideoLlamaError):
    """Annotations or samples that do not have the documented form."""


class OutOfMemoryError(VideoLlamaError):
    """A device has too little free memory for what was asked of it; less at a time may fit."""


class DeviceError(VideoLlamaError):
    """A device that failed for good: whatever this process asks of it from now on fails as well."""


class MessagesError(DatasetError, ValueError):
    """Chat messages that do not have the documented form: a bad sample in training.

    To a caller of `apply_chat_template` it is a `ValueError`, as any unfit argument is.
    """
