"""What people pass for a media file: paths, addresses, bytes, open files; each becomes a path that decoders open."""

from __future__ import annotations

import base64
import binascii
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol, cast, runtime_checkable
from urllib.parse import unquote, unquote_to_bytes

from PIL import Image

from video_llama.errors import MediaError
from video_llama.media.addresses import download
from video_llama.media.reasons import describe_error

__all__ = ["LocalFile", "OpensAsFile", "describe_source", "is_address", "is_file", "open_source"]

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{200,}={0,2}\s*")
# No file system has longer paths.
_LONGEST_PATH = 4096
_SHOWN = 60
_ALLOW = "add --allow-urls, in Python allow_urls=True, to download it; or download it first"


@runtime_checkable
class OpensAsFile(Protocol):
    """Media that become a file only while they are read, such as a member of a tar shard."""

    def open(self) -> AbstractContextManager[str]:
        """Return the path of a file that is there until the context ends."""
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file that decoders can open.

    Attributes:
        path: of the file.
        name: for messages; that of the source where the file is there only while it is read, else the path.
    """

    path: str
    name: str


def is_file(source: Any) -> bool:
    """Whether this stands for a file, which is to be decoded; arrays and images are in memory as they are."""
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        return True
    # Decoded audio of HF datasets names its file, too, which need not be there any more.
    if isinstance(source, Mapping):
        return not source.keys() & {"array", "raw"} and bool(source.keys() & {"bytes", "path"})
    # Has a method `open`, too.
    if isinstance(source, Image.Image):
        return False
    return callable(getattr(source, "read", None)) or isinstance(source, OpensAsFile)


def is_address(text: str) -> bool:
    """Whether this is an address of the web."""
    return text[:8].lower().startswith(("http://", "https://"))


def describe_source(source: Any) -> str:
    """Return a file's name, or a few words for what is in memory."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(os.fspath(source))
        if len(text) > _LONGEST_PATH or text[:5].lower() == "data:":
            return _shortened(text)
        return text
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{type(source).__name__} of {len(source)} bytes"
    if isinstance(source, Mapping):
        return str(source.get("path") or type(source).__name__)
    if callable(getattr(source, "read", None)):
        name = getattr(source, "name", None)
        if isinstance(name, str):
            return name
        return type(source).__name__
    if is_file(source):
        return str(source)
    return "clip"


@contextmanager
def open_source(source: Any, allow_urls: bool = False) -> Iterator[LocalFile]:
    """Make a file of what was passed, for as long as the context lasts.

    Args:
        source: a path (`~` is expanded), a `file://` or `data:` address, with `allow_urls` one of http or https;
            bytes; a file opened in binary mode, which is read from its beginning where it can be; the mapping of HF
            datasets with `bytes` or `path`; or what `OpensAsFile`.
        allow_urls: download http and https addresses.

    Raises:
        MediaError: none of these, or nothing that can be read; and all errors about the file raised within the
            context, with the name of the source.
    """
    with _as_path(source, allow_urls) as file:
        try:
            yield file
        except MediaError as error:
            if error.path != file.path or file.name == file.path:
                raise
            raise type(error)(file.name, error.reason, error.hint) from error


@contextmanager
def _as_path(source: Any, allow_urls: bool, known_name: str | None = None) -> Iterator[LocalFile]:
    name = known_name or describe_source(source)
    if isinstance(source, Mapping):
        # Without its bytes, a path is looked for as it is; with them, it is only their name.
        inner, path_name = source.get("bytes"), None
        if inner is None:
            inner = source.get("path")
        elif source.get("path"):
            path_name = name
        with _as_path(inner, allow_urls, path_name) as file:
            yield file
    elif isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(os.fspath(source))
        if is_address(text) and allow_urls:
            with tempfile.NamedTemporaryFile(prefix="video-llama-") as copy:
                download(text, copy)
                yield LocalFile(copy.name, text)
        elif text[:5].lower() == "data:":
            with _in_memory(_decode_data_address(text, name), name) as path:
                yield LocalFile(path, name)
        else:
            path = _find_path(text, name)
            yield LocalFile(path, path)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        with _in_memory(source, name) as path:
            yield LocalFile(path, name)
    elif callable(getattr(source, "read", None)):
        with _in_memory(_read_all(source, name), name) as path:
            yield LocalFile(path, name)
    elif isinstance(source, OpensAsFile):
        with source.open() as opened, _as_path(opened, False) as file:
            yield LocalFile(file.path, name)
    else:
        hint = "give a path, bytes, a file opened with 'rb', or an array"
        raise MediaError(type(source).__name__, "no media can be read from that", hint)


def _find_path(text: str, name: str) -> str:
    """Return the path that a text means.

    Raises:
        MediaError: it is an address, or cannot be a path.
    """
    if not text.strip():
        raise MediaError("''", "an empty path", "name a file")
    # Whatever it looks like, a file of this name is meant.
    if len(text) <= _LONGEST_PATH and "\0" not in text and os.path.exists(text):
        return text
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme.group(1).lower() == "file":
        return _path_of_address(text)
    if is_address(text):
        raise MediaError(name, "an address, not a file", _ALLOW)
    if scheme is not None and text[scheme.end() :].startswith("//"):
        raise MediaError(name, f"an address ({scheme.group()}//), not a file", "download it first")
    if re.match(r"https?:/[^/]", text, re.IGNORECASE):
        raise MediaError(name, "an address that was made a path", "pass it as text, not as pathlib.Path")
    if text.startswith("~"):
        return os.path.expanduser(text)
    shown = _shortened(text)
    if _BASE64.fullmatch(text):
        raise MediaError(shown, "base64 text, not a path", "give bytes: base64.b64decode(text), or data:;base64,TEXT")
    if len(text) > _LONGEST_PATH or "\n" in text or "\0" in text:
        raise MediaError(shown, "text, not a path", "give the name of a file")
    return text


def _shortened(text: str) -> str:
    return f"{text[:_SHOWN]!r}… ({len(text)} characters)"


def _path_of_address(text: str) -> str:
    """Return the path of a `file:` address (RFC 8089)."""
    rest = text[len("file:") :]
    if rest.startswith("//"):
        host, slash, rest = rest[2:].partition("/")
        rest = slash + rest
        if host not in ("", "localhost") or not rest:
            raise MediaError(text, "a file on another machine", "file:///folder/clip.mp4 is one of this machine")
    path = unquote(rest)
    # Some programs write the name as it is.
    if not os.path.exists(path) and os.path.exists(rest):
        return rest
    return path


def _decode_data_address(text: str, name: str) -> bytes:
    """Return the bytes in a `data:` address (RFC 2397).

    Raises:
        MediaError: it holds none, or is not valid.
    """
    head, comma, content = text.partition(",")
    if not comma:
        raise MediaError(name, "a data: address without a comma before its data", "data:video/mp4;base64,…")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    # In addresses for the web, + and / may be quoted, or replaced by - and _.
    plain = unquote(content).translate(str.maketrans("-_", "+/", " \t\r\n")).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(name, f"a data: address with damaged base64: {error}", "encode it again") from error


def _read_all(file: Any, name: str) -> bytes:
    """Return all bytes of an open file, which stays where it stands if it can."""
    try:
        place = None
        # Those who have just written to it stand at its end.
        if callable(getattr(file, "seekable", None)) and file.seekable():
            place = file.tell()
            file.seek(0)
        content = file.read()
        if place is not None:
            file.seek(place)
    except (OSError, ValueError, TypeError) as error:
        raise MediaError(name, f"the open file cannot be read: {describe_error(error)}") from error
    if isinstance(content, str):
        raise MediaError(name, "a file opened as text", "open it with open(path, 'rb')")
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise MediaError(name, f"its read() gives {type(content).__name__}, not bytes")
    return bytes(content)


@contextmanager
def _in_memory(content: bytes | bytearray | memoryview, name: str) -> Iterator[str]:
    """Yield a path to a file with this content, in memory where the system has such files."""
    if not len(content):
        raise MediaError(name, "empty: there are no bytes in it")
    with _open_new_file() as file:
        file.write(content)
        file.flush()
        if isinstance(file.name, str):
            yield file.name
        else:
            yield f"/proc/self/fd/{file.fileno()}"


def _open_new_file() -> IO[bytes]:
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        return open(os.memfd_create("video-llama"), "wb")
    return cast(IO[bytes], tempfile.NamedTemporaryFile(prefix="video-llama-"))
