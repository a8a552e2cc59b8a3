"""What the driver knows of one clip, or of windows of one, between the first attempt and the record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from video_llama.captioning.inputs import Clip
from video_llama.integrations.ray.captioner import Part

__all__ = ["ATTEMPTS_ALONE", "DECODE_ATTEMPTS", "Work"]

DECODE_ATTEMPTS = 3
"""So often a clip is decoded whose process is lost each time; it then gets an error."""

ATTEMPTS_ALONE = 2
"""So often a clip is captioned alone whose captioner is lost each time; it then gets an error."""


@dataclass(eq=False)
class Work:
    """A clip, or some windows of it.

    Args:
        key, clip: the clip, by its number.
        first: the window at which decoding begins.
        part, payload: what was decoded: its description, and the reference to it.
        decode_losses, losses: how often a process was lost that decoded it, or that captioned it alone.
        is_suspect: whether a captioner was lost that worked at it among others.
    """

    key: int
    clip: Clip
    first: int = 0
    part: Part | None = None
    payload: Any = None
    decode_losses: int = 0
    losses: int = 0
    is_suspect: bool = False

    @property
    def num_wanted(self) -> int:
        """Return how many windows there are to caption."""
        return len(self.part.wanted) if self.part is not None else 0
