"""What a file is by its content, where the first bytes are not those of a video or audio file.

Every still image that Pillow reads is an image; so are those in the boxes of an MP4 file (HEIC, AVIF), of which FFmpeg
would show one tile.
"""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from typing import BinaryIO

from PIL import Image

__all__ = ["IMAGE_BRANDS", "PILLOW_ERRORS", "describe_image_boxes", "describe_other", "has_gif_image"]

# What Pillow's parsers raise on damaged files: OSError for truncation, the others for what they stumble over.
PILLOW_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_SIGNATURES = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF document",
    # Playlists make a decoder open the other files and addresses they name, which an upload must never do.
    b"#EXTM3U": "a playlist",
    b"ffconcat": "a playlist",
    b"\x00\x00\x00\x0cJXL ": "a still image (JPEG XL)",
    b"\xff\x0a": "a still image (JPEG XL)",
}
# Images that Pillow does not identify are damaged, or of a kind it has no decoder for.
_IMAGE_SIGNATURES = {
    b"\x89PNG\r\n": "a still image (PNG)",
    b"\xff\xd8\xff": "a still image (JPEG)",
    b"BM": "a still image (BMP)",
    b"II*\x00": "a still image (TIFF)",
    b"MM\x00*": "a still image (TIFF)",
}
# Pillow identifies these, but has no decoder for them, runs another program for them (EPS), or they are videos.
_NOT_STILL_IMAGES = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "MPEG", "WMF"}
# What is read of a JPEG file to find out whether one more image follows.
_MOST_OF_AN_IMAGE = 2**26
_ANIMATIONS = {"WEBP": "an animation (WebP)", "PNG": "an animation (PNG)", "GIF": ""}

# Major brands of images in the boxes of MP4 (ISO/IEC 23008-12, annex B). FFmpeg shows such an image tile by tile.
IMAGE_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "a still image (AVIF)"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis"), "a still image (HEIC)"),
    **dict.fromkeys((b"hevc", b"hevx", b"hevm", b"hevs"), "a still image (HEIC)"),
    **dict.fromkeys((b"mif1", b"mif2", b"msf1", b"miaf"), "a still image (HEIF)"),
    **dict.fromkeys((b"avci", b"avcs", b"jpeg", b"jpgs", b"vvic", b"vvis", b"evbi", b"evbs"), "a still image (HEIF)"),
}
# Those of sequences of images, which are videos if there is a track.
_SEQUENCE_BRANDS = {b"avis", b"hevc", b"hevx", b"hevm", b"hevs", b"msf1", b"avcs", b"jpgs", b"vvis", b"evbs"}


def describe_image_boxes(path: str, head: bytes) -> str:
    """Return what a file is whose boxes are those of an image, or "" for a sequence of images, which is a video."""
    major = head[8:12]
    if major in _SEQUENCE_BRANDS and _has_box(path, b"moov"):
        return ""
    description = IMAGE_BRANDS[major]
    # The general brands stand before those that name the codec.
    for start in range(16, min(int.from_bytes(head[:4], "big"), len(head)), 4):
        if description != "a still image (HEIF)":
            break
        description = IMAGE_BRANDS.get(head[start : start + 4], description)
    return description


def _has_box(path: str, kind: bytes) -> bool:
    """Whether one of the top-level boxes is of this kind."""
    size, start = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while start + 8 <= size:
            file.seek(start)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if header[4:8] == kind:
                return True
            if length < 8:
                return False
            start += length
    return False


def describe_other(path: str, head: bytes) -> str:
    """Return what Pillow or the first bytes say of a file, or ""."""
    for signature, description in _SIGNATURES.items():
        if head.startswith(signature):
            return description
    identified = _ask_pillow(path)
    if identified is not None:
        return identified
    for signature, description in _IMAGE_SIGNATURES.items():
        if head.startswith(signature):
            return description
    if head[:4] == b"RIFF":
        return "a still image (WebP)"
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer, not the file itself"
    if _is_text(head):
        return "a text file"
    return ""


def _ask_pillow(path: str) -> str | None:
    """Return what a file is by its header: an image, an animation, "" for a video; None where Pillow knows none."""
    try:
        # The open file, not the path: Pillow 11 follows links, and files in memory have no path to follow.
        with open(path, "rb") as file, Image.open(file) as image:
            name = image.format or ""
            if name in _NOT_STILL_IMAGES:
                return None
            # The image that an animated PNG has for old viewers is no frame.
            is_one_frame = getattr(image, "default_image", False) and getattr(image, "n_frames", 1) == 2
            if name in _ANIMATIONS and getattr(image, "is_animated", False) and not is_one_frame:
                return _ANIMATIONS[name]
            if name == "JPEG" and _is_motion_jpeg(file, image.size):
                return ""
    except Image.DecompressionBombError:
        return "a still image of too many pixels"
    except PILLOW_ERRORS as error:
        # Pillow's own have no number: this one is of the system.
        if isinstance(error, OSError) and error.errno:
            raise
        return None
    return f"a still image ({name.replace('WEBP', 'WebP')})"


def _is_motion_jpeg(file: BinaryIO, size: tuple[int, int]) -> bool:
    """Return whether another image of the same size follows a JPEG image: frames of a camera without a container.

    Previews that cameras put behind a photo are smaller, and stereo images are a format of their own (MPO).
    """
    file.seek(0)
    content = file.read(_MOST_OF_AN_IMAGE)
    # An image within the header (a thumbnail) has an end, too: it is looked for behind the start of the scan.
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1 : place + 2] != b"\xda":
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    end = content.find(b"\xff\xd9", place)
    rest = content[end + 2 :].lstrip(b"\0")
    if end < 0 or not rest.startswith(b"\xff\xd8\xff"):
        return False
    try:
        with Image.open(BytesIO(rest)) as following:
            return following.size == size
    except PILLOW_ERRORS:
        # Something else, which happens to begin so: the photo is whole.
        return False


def has_gif_image(blocks: bytes) -> bool:
    """Return whether an image is among these blocks of a GIF file, which may begin with the file's header.

    Comments and what programs note (GIF89a, sections 23 to 26) may stand after the last image.
    """
    place = 0
    if blocks.startswith(b"GIF"):
        place = 13
        # A table of 2 to 256 colours follows.
        if blocks[10] & 0x80:
            place += 3 << (blocks[10] & 7) + 1
    while place < len(blocks) and blocks[place] == 0x21:
        # Behind the kind of extension: blocks of up to 255 bytes, the last one empty.
        place += 2
        while place < len(blocks) and blocks[place]:
            place += 1 + blocks[place]
        place += 1
    return place < len(blocks) and blocks[place] == 0x2C


def _is_text(head: bytes) -> bool:
    """Whether these first bytes are UTF-8 without control characters (a cut last character is forgiven)."""
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(character >= " " or character in "\t\n\r\f" for character in text)
