"""What a task of Ray does: decode one clip, or some windows of a long one. It loads no torch."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from video_llama.errors import VideoLlamaError
from video_llama.inference.decode_process import DecodeProcess, decode_source, pack_source
from video_llama.media.decode import ClipDecoder, DecodedClip

__all__ = ["decode"]


def decode(
    decoder: ClipDecoder, seconds: float, source: Any, first: int
) -> tuple[tuple[int, int, float], list[DecodedClip | VideoLlamaError]]:
    """Decode a source from a window on.

    The decoder runs in a process below that of Ray, so that one that crashes or takes longer than `seconds` is an
    error of the clip, as in a run without Ray.

    Returns:
        (number of windows that the clip has, of those that were read, seconds that it took), and what was read.
    """
    begun = time.perf_counter()
    packed = pack_source(source)
    decoded = None
    if packed is not None:
        decoded = decode_source(_process(decoder, seconds), packed, source, first)
    if decoded is None:
        raise TypeError(f"{type(source).__name__} cannot be sent to the process that decodes")
    total, windows = decoded
    return (total, len(windows), time.perf_counter() - begun), windows


@cache
def _process(decoder: ClipDecoder, seconds: float) -> DecodeProcess:
    """Return this worker's process; Ray runs one task at a time in a worker, and many one after the other."""
    return DecodeProcess(decoder, seconds)
