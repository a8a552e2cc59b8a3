"""What a media file is before a decoder sees it: there, whole, and of the right kind.

Nothing here decodes. Only the first bytes and the sizes that containers declare are read, so the
answers are quick and the same whichever decoder is used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from video_llama.errors import MediaError

__all__ = ["check_media_file", "describe_content", "find_truncation"]

_HEAD_BYTES = 1024

_SIGNATURES = {
    b"\x89PNG\r\n": "a still image (PNG)",
    b"\xff\xd8\xff": "a still image (JPEG)",
    b"BM": "a still image (BMP)",
    b"II*\x00": "a still image (TIFF)",
    b"MM\x00*": "a still image (TIFF)",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF document",
    # Playlists make a decoder open the other files and addresses they name, which an upload must never do.
    b"#EXTM3U": "a playlist",
    b"ffconcat": "a playlist",
}

_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
_BOXES = {*_FIRST_BOXES, b"moof", b"mfra", b"sidx", b"styp", b"meta", b"udta", b"uuid", b"pdin", b"emsg"}

_UNKNOWN_CHUNK_SIZE = 0x7FFFF000  # programs that write to a pipe put this or more where the size belongs
_CHUNK_SLACK_BYTES = 16  # some programs count the chunk's own header, or a padding byte that is not there


def check_media_file(path: str | os.PathLike[str]) -> str:
    """Absolute name of an existing, readable, non-empty regular file.

    Raises:
        MediaError: anything else. A pipe or a device would block, an address would be fetched: both are
            refused.
    """
    file = Path(path)
    if not file.exists():
        raise MediaError(path, "no such file")
    if file.is_dir():
        raise MediaError(path, "a folder, not a file")
    if not file.is_file():
        raise MediaError(path, "not a regular file")
    if not os.access(file, os.R_OK):
        raise MediaError(path, "no permission to read it")
    if file.stat().st_size == 0:
        raise MediaError(path, "the file is empty")
    return str(file.absolute())


def describe_content(path: str) -> str:
    """What a file that is neither video nor sound seems to be, or "" if its first bytes do not tell."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    for signature, description in _SIGNATURES.items():
        if head.startswith(signature):
            return description
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a still image (WebP)"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file itself"
    return "a text file" if _is_text(head) else ""


def find_truncation(path: str) -> str:
    """How a container falls short of the size it declares, or "" if it is whole or declares none."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] in _FIRST_BOXES:
            declared = _declared_end_of_boxes(file, size)
        elif head[:4] == b"\x1aE\xdf\xa3":
            declared = _declared_end_of_matroska(file, size)
        elif head[:4] in (b"RIFF", b"FORM"):
            declared = _declared_end_of_chunk(head) - _CHUNK_SLACK_BYTES
        else:
            declared = 0
    return f"the file is truncated: {size} of {declared} bytes are there" if size < declared else ""


def _is_text(head: bytes) -> bool:
    """Whether these first bytes are UTF-8 without control characters (a cut last character is forgiven)."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(character >= " " or character in "\t\n\r\f" for character in text)


def _declared_end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last top-level box of an MP4 or QuickTime file (ISO 14496-12, section 4.2) says it ends."""
    start = 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:  # a 64-bit length follows the type
            length = int.from_bytes(header[8:16], "big")
        if length < 8 or header[4:8] not in _BOXES:
            return start  # "to the end of the file", or what some programs add after the last box
        start += length
    return start


def _declared_end_of_matroska(file: BinaryIO, size: int) -> int:
    """Where the segment of a Matroska or WebM file (RFC 9559) says it ends; 0 if it does not say."""
    file.seek(4)
    header_size = _read_ebml_size(file)
    if header_size is None or header_size > size:
        return 0
    file.seek(header_size, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    segment_size = _read_ebml_size(file)
    return 0 if segment_size is None else file.tell() + segment_size


def _read_ebml_size(file: BinaryIO) -> int | None:
    """An EBML variable-length size; None for "unknown", as live recordings have."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << 7 * length) - 1)
    return None if value == (1 << 7 * length) - 1 else value


def _declared_end_of_chunk(head: bytes) -> int:
    """Where the outer chunk of an AVI, WAV (little-endian) or AIFF (big-endian) file says it ends."""
    size = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
    return 0 if size >= _UNKNOWN_CHUNK_SIZE else size + 8
