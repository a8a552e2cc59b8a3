"""Annotated examples before their media are read, and a compact table of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_llama.constants import Modality
from video_llama.data.remote import is_remote, local_file
from video_llama.errors import DatasetError
from video_llama.media.containers import check_media_file

__all__ = [
    "SUFFIXES",
    "Example",
    "ExampleTable",
    "MediaSource",
    "ShardMember",
    "media_kinds",
    "media_sources",
    "open_media",
    "read_media",
    "source_of",
]

_READ_BYTES = 1 << 20

# Files, broadcasts and discs, cameras and phones, streams without a container, animations.
_VIDEO_SUFFIXES = """.mp4 .webm .mkv .mov .avi .m4v .flv .f4v .wmv .asf .ogv .mxf .ivf .y4m
    .mpg .mpeg .m1v .m2v .ts .m2t .mts .m2ts .vob .3gp .3g2 .dv .mjpeg .mjpg
    .h264 .264 .avc .h265 .265 .hevc .gif"""

# File names of the media in a shard, and of the videos in a folder.
SUFFIXES: dict[Modality, tuple[str, ...]] = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    "video": tuple(_VIDEO_SUFFIXES.split()),
    "audio": (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".mp4", ".webm", ".mkv", ".mov", ".avi"),
}


@dataclass(frozen=True)
class MediaSource:
    """Where the bytes of one media file are.

    Args:
        path: of the file, or of the tar shard that holds it.
        name: within the shard; None for a file of its own.
        offset, size: in bytes, within the shard.
        content: the bytes themselves, of a file that a row holds; `path` then names the rows.
        start_seconds, end_seconds: the part of a video or of its audio; None is its start or its end.
    """

    path: str
    name: str | None = None
    offset: int = 0
    size: int = 0
    content: bytes | None = field(default=None, repr=False)
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def is_part(self) -> bool:
        """Return whether it is a part of the file only."""
        return self.start_seconds is not None or self.end_seconds is not None

    @property
    def is_absent(self) -> bool:
        """Return whether there is no such file."""
        # One at an address is absent when it is read and not found.
        return self.content is None and not is_remote(self.path) and not os.path.exists(self.path)


@dataclass(frozen=True)
class Example:
    """One annotated example.

    Args:
        id: for logs: the dataset and the annotation's own id.
        kind: modality of its media file.
        source: the media file; None if the text names its media (`messages`).
        text: one of `{"caption": …}`, `{"QA": […]}`, `{"conversations": […]}`, `{"messages": […]}`.
    """

    id: str
    kind: Modality
    source: MediaSource | None
    text: Mapping[str, Any]


def build_example(id_: str, kind: Modality, fields: Sequence[Any] | None, text: Mapping[str, Any]) -> Example:
    """Return an example from the fields of its source."""
    return Example(id_, kind, MediaSource(*fields) if fields else None, text)


def source_of(path: str | Mapping[str, Any]) -> MediaSource:
    """Return the file of an item of messages: a path, or the fields of a `MediaSource` for one in a shard."""
    return MediaSource(**path) if isinstance(path, Mapping) else MediaSource(path)


def fields_of(source: MediaSource | None) -> list[Any] | None:
    """Return the fields of a source on disk, for `MediaSource(*fields)`."""
    if source is None:
        return None
    fields: list[Any] = [source.path, source.name, source.offset, source.size]
    if source.is_part:
        fields += [None, source.start_seconds, source.end_seconds]
    return fields


def media_sources(example: Example) -> list[MediaSource]:
    """Return all media files of an example, in order of appearance."""
    if example.source is not None:
        return [example.source]
    sources = []
    for message in example.text.get("messages", ()):
        if not isinstance(message["content"], str):
            sources += [source_of(item["path"]) for item in message["content"] if item["type"] != "text"]
    return sources


def media_kinds(example: Example) -> list[Modality]:
    """Return the modalities of an example's media files, in order of appearance."""
    if example.source is not None:
        return [example.kind]
    contents = [message["content"] for message in example.text.get("messages", ())]
    items = [item for content in contents if not isinstance(content, str) for item in content]
    return [item["type"] for item in items if item["type"] != "text"]


class ExampleTable(Sequence[Example]):
    """Examples as one block of bytes, shared by all data loader workers."""

    # Reference counts of millions of Python objects would copy them, page by page, into every forked worker; two
    # arrays stay shared.
    def __init__(self, examples: Iterable[Example]) -> None:
        rows = bytearray()
        ends = [0]
        for example in examples:
            row = [example.id, example.kind, fields_of(example.source), example.text]
            # Half of a surrogate pair, which JSON can hold, is not text: it becomes a question mark.
            rows += json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
            ends.append(len(rows))
        self._rows = np.frombuffer(bytes(rows), dtype=np.uint8)
        self._ends = np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def row_sizes(self) -> NDArray[np.int64]:
        """Return the bytes of each example, which tell about how long its text is."""
        return np.diff(self._ends)

    def digest(self) -> str:
        """Return a short digest of all examples: ids, texts, paths and order."""
        return hashlib.sha256(self._rows.data).hexdigest()[:16]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = index % len(self)
        # Only the row that is asked for becomes Python objects.
        row = self._rows[self._ends[position] : self._ends[position + 1]].tobytes()
        id_, kind, fields, text = json.loads(row)
        return build_example(id_, kind, fields, text)


@dataclass(frozen=True)
class ShardMember:
    """A file in a tar shard, which is copied to a file of its own only while it is read."""

    source: MediaSource

    def open(self) -> AbstractContextManager[str]:
        return open_media(self.source)

    def __str__(self) -> str:
        return f"{self.source.path}#{self.source.name}"


@contextlib.contextmanager
def open_media(source: MediaSource) -> Iterator[str]:
    """Yield a path that decoders can open; a file in a shard is copied to a temporary one.

    Raises:
        DatasetError: the shard is shorter than its index says.
    """
    if source.name is None:
        with local_file(source.path) as path:
            yield path
        return
    # Decoders need a file of its own that they can seek in. Some choose the format by its suffix.
    handle, path = tempfile.mkstemp(suffix=Path(source.name).suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(read_media(source))
        yield path
    finally:
        os.unlink(path)


def read_media(source: MediaSource) -> Iterator[bytes]:
    """Yield the bytes of a media file in chunks.

    Raises:
        MediaError: there is no such file.
        DatasetError: the shard is shorter than its index says.
    """
    if source.content is not None:
        yield source.content
        return
    with local_file(source.path) as path, open(check_media_file(path), "rb") as file:
        file.seek(source.offset)
        # A member of a shard ends before the shard does, so its size comes from the index.
        left = source.size if source.name is not None else os.fstat(file.fileno()).st_size
        while left:
            chunk = file.read(min(left, _READ_BYTES))
            if not chunk:
                raise DatasetError(f"{source.path}: {source.name} is cut off; the shard has changed or is truncated")
            left -= len(chunk)
            yield chunk
