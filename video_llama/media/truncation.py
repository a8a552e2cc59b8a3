"""How much of a file is there: what containers say of their own size, or of their end, against the bytes on disk.

FFmpeg plays what it finds, so a download that broke off would pass for a short clip.
"""

from __future__ import annotations

import os
from typing import BinaryIO

__all__ = ["FIRST_BOXES", "describe_truncation"]

FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"}
_BOXES = {*FIRST_BOXES, b"moof", b"mfra", b"sidx", b"styp", b"meta", b"udta", b"uuid", b"pdin", b"emsg"}

# Programs that write to a pipe put this or more where the size belongs.
_UNKNOWN_CHUNK_SIZE = 0x7FFFF000
# Some programs count the chunk's own header, or a padding byte that is not there.
_CHUNK_SLACK_BYTES = 16

# Tags behind an MP3 that the encoder counted, and that somebody removed.
_MP3_SLACK_BYTES = 4096
_OGG_HEADER_BYTES = 27
# A page has at most 255 segments of 255 bytes.
_LARGEST_OGG_PAGE = _OGG_HEADER_BYTES + 255 + 255 * 255
# Blocks of a GIF have up to 255 bytes and are full but for the last ones; a file of tiny ones keeps a server busy.
_BYTES_FOR_A_GIF_STEP = 32
_FREE_GIF_STEPS = 10_000


def describe_truncation(file: BinaryIO, size: int) -> str:
    """Say how a file falls short of what it declares, or "" if it is whole or does not tell.

    Args:
        file: it, opened at its start.
        size: of the file, in bytes.

    Raises:
        OSError: it cannot be read.
    """
    head = file.read(12)
    if head[:4] == b"GIF8":
        return _missing_end_of_gif(file, size)
    if head[:4] == b"OggS":
        return _missing_end_of_ogg(file, size)
    if head[4:8] in FIRST_BOXES:
        declared = _declared_end_of_boxes(file, size)
    elif head[:4] == b"\x1aE\xdf\xa3":
        declared = _declared_end_of_matroska(file, size)
    elif head[:4] in (b"RIFF", b"FORM"):
        declared = _declared_end_of_chunk(head) - _CHUNK_SLACK_BYTES
    elif head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        declared = _declared_end_of_mp3(file, head) - _MP3_SLACK_BYTES
    else:
        declared = 0
    return f"the file is truncated: {size} of {declared} bytes are there" if size < declared else ""


def _declared_end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last top-level box of an MP4 or QuickTime file (ISO 14496-12, section 4.2) says it ends."""
    start = 0
    while start + 8 <= size:
        file.seek(start)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        # A 64-bit length follows the type.
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8 or header[4:8] not in _BOXES:
            # "to the end of the file", or what some programs add after the last box.
            return start
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


def _declared_end_of_mp3(file: BinaryIO, head: bytes) -> int:
    """Where the header that encoders put into the first frame says that the last one ends; 0 without such a header."""
    start = 0
    if head[:3] == b"ID3":
        # ID3v2.4, section 3.1: seven bits in each byte of the size.
        for byte in head[6:10]:
            start = start << 7 | byte & 0x7F
        start += 10
    file.seek(start)
    frame = file.read(64)
    if len(frame) < 64 or frame[0] != 0xFF or frame[1] < 0xE0:
        return 0
    # It stands behind the side information, whose size depends on version and channels.
    is_version_1, is_mono = frame[1] >> 3 & 3 == 3, frame[3] >> 6 == 3
    place = 4 + {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[is_version_1, is_mono]
    flags = int.from_bytes(frame[place + 4 : place + 8], "big")
    if frame[place : place + 4] not in (b"Xing", b"Info") or not flags & 2:
        return 0
    # The number of frames comes first, if it is there.
    place += 8 + 4 * (flags & 1)
    return start + int.from_bytes(frame[place : place + 4], "big")


def _missing_end_of_ogg(file: BinaryIO, size: int) -> str:
    """Say that the last page (RFC 3533, section 6) is cut. That it is not marked as the last one is no damage: live
    recordings end so."""
    start = max(0, size - _LARGEST_OGG_PAGE)
    file.seek(start)
    tail = file.read(_LARGEST_OGG_PAGE)
    place = tail.rfind(b"OggS\0")
    if place < 0:
        return ""
    header = tail[place : place + _OGG_HEADER_BYTES]
    end = place + _OGG_HEADER_BYTES
    if len(header) == _OGG_HEADER_BYTES:
        lengths = tail[end : end + header[26]]
        end += header[26] + sum(lengths)
    rest = tail[end:]
    # Behind a whole page may stand the beginning of the next one, or tags.
    if end > len(tail) or (rest and b"OggS\0".startswith(rest)):
        return f"the file is truncated: the page of {len(tail) - place} bytes at its end is not complete"
    return ""


def _missing_end_of_gif(file: BinaryIO, size: int) -> str:
    """Say that the trailer (GIF89a, section 27) is not there."""
    file.seek(0)
    header = file.read(13)
    file.seek(_gif_colours(header[10:11]), os.SEEK_CUR)
    is_inside = False
    for _ in range(size // _BYTES_FOR_A_GIF_STEP + _FREE_GIF_STEPS):
        byte = file.read(1)
        if not byte:
            return "the file is truncated: the mark at the end of a GIF file is not there"
        if is_inside:
            # The content of a block comes in pieces that begin with their length; the last one has none.
            is_inside = byte != b"\0"
            file.seek(byte[0], os.SEEK_CUR)
        elif byte == b"\x3b":
            return ""
        elif byte == b"\x2c":
            file.seek(_gif_colours(file.read(9)[8:9]) + 1, os.SEEK_CUR)
            is_inside = True
        elif byte == b"\x21":
            file.seek(1, os.SEEK_CUR)
            is_inside = True
        # Browsers step over what else stands between the blocks.
    return ""


def _gif_colours(flags: bytes) -> int:
    """Return the size in bytes of a table of colours."""
    if not flags or not flags[0] & 0x80:
        return 0
    return 3 << (flags[0] & 7) + 1
