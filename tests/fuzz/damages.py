"""Ways to break a file, drawn from a seed. Each takes what a whole file holds and returns what the broken one does."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable

Damage = Callable[[bytes, random.Random], bytes]

# What parsers stumble over: extremes of the sizes, counts and times that headers state.
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 10**9)
_HEADER_BYTES = 600


def _place(content: bytes, rng: random.Random) -> int:
    return rng.randrange(max(len(content), 1))


def cut_end(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((len(content) // 16, _place(content, rng), len(content) - 1))]


def cut_start(content: bytes, rng: random.Random) -> bytes:
    return content[rng.randrange(1, 2 + len(content) // 4) :]


def flip_some(content: bytes, rng: random.Random, most: int = 10, end: int | None = None) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, most)):
        damaged[rng.randrange(min(len(damaged), end or len(damaged)))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def flip_many(content: bytes, rng: random.Random) -> bytes:
    return flip_some(content, rng, most=1000)


def flip_header(content: bytes, rng: random.Random) -> bytes:
    return flip_some(content, rng, most=20, end=_HEADER_BYTES)


def zero_run(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    length = rng.randint(1, 1 + len(content) // 4)
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def swap_parts(content: bytes, rng: random.Random) -> bytes:
    one, two, three = sorted(_place(content, rng) for _ in range(3))
    return content[:one] + content[two:three] + content[one:two] + content[three:]


def take_out(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    return content[:start] + content[start + rng.randint(1, 1 + len(content) // 8) :]


def put_in(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    return content[:start] + rng.randbytes(rng.randint(1, 5000)) + content[start:]


def repeat_part(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    part = content[start : start + rng.randint(1, 4000)]
    return content[:start] + part * rng.randint(2, 20) + content[start:]


def join_with_itself(content: bytes, rng: random.Random) -> bytes:
    return content + content[rng.randrange(2) * (_place(content, rng)) :]


def lie_in_numbers(content: bytes, rng: random.Random) -> bytes:
    """Put extremes into numbers of the header, in the order of bytes of either kind of machine."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        size = rng.choice((1, 2, 4))
        start = rng.randrange(max(1, min(len(damaged), _HEADER_BYTES) - size))
        value = rng.choice(_EXTREMES) & ((1 << 8 * size) - 1)
        damaged[start : start + size] = value.to_bytes(size, rng.choice(("big", "little")))
    return bytes(damaged)


def lie_in_tables(content: bytes, rng: random.Random) -> bytes:
    """Put an extreme behind one of the names in a file: sizes and counts stand there."""
    names = (b"stsz", b"stco", b"stsc", b"stts", b"ctts", b"mdhd", b"mvhd", b"tkhd", b"strh", b"avih", b"fmt ", b"data")
    names += (b"IHDR", b"ANMF", b"VP8 ", b"idx1", b"trun", b"tfhd", b"esds", b"avcC", b"hvcC", b"elst", b"OpusHead")
    there = [name for name in names if name in content]
    if not there:
        return lie_in_numbers(content, rng)
    start = content.index(rng.choice(there)) + 4 + 4 * rng.randrange(10)
    value = rng.choice(_EXTREMES).to_bytes(4, rng.choice(("big", "little")))
    return content[:start] + value + content[start + 4 :]


def nest_boxes(content: bytes, rng: random.Random) -> bytes:
    """Thousands of boxes in each other, before or within what there was."""
    depth = rng.choice((100, 5000))
    name = rng.choice((b"moov", b"trak", b"meta", b"udta", b"LIST"))
    boxes = b"".join(struct.pack(">I", 8 * (depth - level)) + name for level in range(depth))
    start = rng.choice((0, 32, len(content)))
    return content[:start] + boxes + content[start:]


def make_bomb(content: bytes, rng: random.Random) -> bytes:
    """An image that unpacks to far more than it has, or a text in it that does."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    side = rng.choice((16_000, 40_000, 2**31 - 1))
    if rng.random() < 0.3:
        side = 64
    head = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, rng.choice((0, 2, 6)), 0, 0, 0))
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(30_000_000), 9))
    pixels = chunk(b"IDAT", zlib.compress(bytes(3_000_000), 9))
    return b"\x89PNG\r\n\x1a\n" + head + text * rng.randint(0, 3) + pixels + chunk(b"IEND", b"")


def make_playlist(content: bytes, rng: random.Random) -> bytes:
    """Text that makes a player open other files or addresses."""
    there = rng.choice(("/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x.ts", "concat:a|b", "/dev/zero"))
    forms = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{there}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{there}'\n",
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{there}</BaseURL></MPD>',
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na={there}\n",
        f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{there}"/></svg>',
    )
    return rng.choice(forms).encode() + content[: rng.choice((0, len(content)))]


def leave_little(content: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"", content[:1], content[:12], content[:100], rng.randbytes(3000)))


DAMAGES: dict[str, Damage] = {
    "cut_end": cut_end,
    "cut_start": cut_start,
    "flip_some": flip_some,
    "flip_many": flip_many,
    "flip_header": flip_header,
    "zero_run": zero_run,
    "swap_parts": swap_parts,
    "take_out": take_out,
    "put_in": put_in,
    "repeat_part": repeat_part,
    "join_with_itself": join_with_itself,
    "lie_in_numbers": lie_in_numbers,
    "lie_in_tables": lie_in_tables,
    "nest_boxes": nest_boxes,
    "make_bomb": make_bomb,
    "make_playlist": make_playlist,
    "leave_little": leave_little,
}
