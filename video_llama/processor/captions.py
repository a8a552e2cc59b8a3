"""Captions as the training data of stage 1 has them: BLIP's cleaning (Li et al. 2022, arXiv 2201.12086)."""

from __future__ import annotations

import re

from video_llama.registry import PROCESSORS

__all__ = ["BlipCaptionProcessor"]

_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_WHITE_SPACE_RUN = re.compile(r"\s{2,}")


@PROCESSORS.register("blip_caption")
class BlipCaptionProcessor:
    """Lower-case a caption, take out punctuation and cap its length.

    Args:
        prompt: words put in front of every caption.
        max_words: most words kept, those of the prompt not counted.
    """

    def __init__(self, prompt: str = "", max_words: int = 50) -> None:
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        """The cleaned caption."""
        plain = _PUNCTUATION.sub(" ", caption.lower())
        plain = _WHITE_SPACE_RUN.sub(" ", plain).rstrip("\n").strip(" ")
        # Words are what single spaces part: a line break inside a caption stays, and counts as no gap.
        return self.prompt + " ".join(plain.split(" ")[: self.max_words])
