"""What errors of the operating system and of FFmpeg mean for a media file, in words."""

from __future__ import annotations

import errno
import os

__all__ = ["describe_error", "why_not_found"]

# FFmpeg says -1 where it has no reason, which is this number. It has nothing to do with the rights of the file.
_NO_REASON = "FFmpeg cannot go on in it and does not say why"
_WORDS = {
    errno.EPERM: _NO_REASON,
    errno.EAGAIN: "it ends before its first frame",
    errno.EINVAL: "FFmpeg refuses its settings",
    errno.ENOMEM: "it needs more memory than there is, or claims a size that it does not have",
    errno.EDOM: "a value in it is out of range",
    errno.ERANGE: "a value in it is out of range",
    errno.ENOSYS: "FFmpeg has no decoder for this kind of it",
}
# FFmpeg's own codes have words of their own, but for these.
_WORDS_OF_FFMPEG = {
    "Immediate exit requested": "reading it takes too long",
    "Not yet implemented in FFmpeg, patches welcome": "FFmpeg has no decoder for this kind of it",
    "Unknown error occurred": _NO_REASON,
    "Internal bug, should not have happened": _NO_REASON,
    "End of file": "it ends too early",
}
_NOT_FOUND = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file: a part of the path is not a folder",
    errno.EACCES: "no permission to enter its folder",
    errno.ELOOP: "links in the path lead in a circle",
    errno.ENAMETOOLONG: "no such file: the name is too long",
}


def describe_error(error: Exception) -> str:
    """Return what went wrong: in words where FFmpeg's or the system's own would mislead."""
    number, text = getattr(error, "errno", None), getattr(error, "strerror", None)
    # FFmpeg's messages about damaged files can quote bytes of the file, which PyAV then fails to decode.
    if isinstance(error, UnicodeDecodeError):
        return "unreadable bytes"
    if number in _WORDS and type(error).__module__.startswith("av."):
        return _WORDS[number]
    text = text or str(error) or type(error).__name__
    return _WORDS_OF_FFMPEG.get(text, text)


def why_not_found(path: str | os.PathLike[str], error: OSError) -> str:
    """Return why the system does not find a file."""
    if error.errno == errno.ENOENT and os.path.islink(path):
        return "a link to a file that is not there"
    return _NOT_FOUND.get(error.errno or 0, f"cannot be read: {describe_error(error)}")
