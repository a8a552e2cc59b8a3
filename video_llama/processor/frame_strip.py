"""Frames with their times side by side, as notebooks show them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["frame_strip"]

_THUMBNAIL_SIZE = 112


def frame_strip(frames: NDArray[np.uint8], times_seconds: Sequence[float]) -> str:
    """Return HTML with small copies of frames, in which nothing is loaded from elsewhere.

    Args:
        frames: (frames, height, width, 3) uint8.
        times_seconds: of the frames; none for images.
    """
    captions = [f"{seconds:.1f} s" for seconds in times_seconds] or [""] * len(frames)
    cells = "".join(_cell(frame, caption) for frame, caption in zip(frames, captions, strict=True))
    return f"<div>{cells}</div>"


def _cell(frame: Any, caption: str) -> str:
    image, buffer = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    image.save(buffer, format="JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    style = "display:inline-block;margin:2px;text-align:center"
    return f'<span style="{style}"><img src="data:image/jpeg;base64,{data}" alt=""><br>{caption}</span>'
