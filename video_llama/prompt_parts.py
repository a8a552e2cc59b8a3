"""The parts of a prompt: template text, typed text and placeholders; and the words that introduce media.

Template text is trusted. Typed text is not: what looks like a special token or a placeholder in it stays plain text.
`video_llama.processor.prompt` turns parts into token ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from video_llama.constants import AUDIO_PLACEHOLDER, IMAGE_PLACEHOLDER

__all__ = [
    "Content",
    "Placeholder",
    "PromptPart",
    "Text",
    "audio_prefix",
    "image_prefix",
    "media_prefix",
    "parse_placeholders",
    "render_parts",
    "video_prefix",
    "video_with_audio_prefix",
]


@dataclass(frozen=True)
class Text:
    """A stretch of a prompt that is text.

    Args:
        text: the characters.
        trusted: written by the template, so that special tokens in it count as such.
        answer: part of an answer or of what ends it: where training takes its loss.
    """

    text: str
    trusted: bool = False
    answer: bool = False


@dataclass(frozen=True)
class Placeholder:
    """Where the features of one media item go.

    Args:
        kind: "image" for frames (a video or a still image), or "audio".
    """

    kind: Literal["image", "audio"]

    @property
    def token(self) -> str:
        """The placeholder as it is written in a prompt string."""
        return AUDIO_PLACEHOLDER if self.kind == "audio" else IMAGE_PLACEHOLDER


PromptPart = Text | Placeholder
Content = str | Sequence[str | Placeholder] | None
"""What a message says: text, text with media, or None for an answer that is still to come."""

# The published weights were trained with these sentences and runs of spaces, which are tokens of their own.
_AUDIO = "Close your eyes, open your ears and you imagine only based on the sound that: "
_FRAMES = "Close your ears, open your eyes and you see that "
_QUESTION = "Now answer my question based on what you have just"
_GAP = " " * 17


def render_parts(parts: Iterable[PromptPart]) -> str:
    """Return the parts as one string, in which template text and typed text can no longer be distinguished."""
    return "".join(part.text if isinstance(part, Text) else part.token for part in parts)


def parse_placeholders(text: str) -> list[PromptPart]:
    """Split a prompt string into parts, all of it trusted: for prompts, never for typed text."""
    placeholders = {item.token: item for item in (Placeholder("image"), Placeholder("audio"))}
    parts = re.split(f"({'|'.join(map(re.escape, placeholders))})", text)
    return [placeholders.get(part) or Text(part, trusted=True) for part in parts if part]


def video_prefix(message: str = "") -> list[str | Placeholder]:
    """Return the words before a question about a video.

    Args:
        message: which frames were sampled, as in `VideoFrames.message`.
    """
    return ["<Video>", Placeholder("image"), f"</Video> {message}"]


def image_prefix() -> list[str | Placeholder]:
    """Return the words before a question about a still image."""
    return ["<Image>", Placeholder("image"), "</Image> "]


def audio_prefix() -> list[str | Placeholder]:
    """Return the words before a question about audio alone, after the pattern of `video_with_audio_prefix`."""
    return [_AUDIO, Placeholder("audio"), f".{_GAP}{_QUESTION} heard."]


def video_with_audio_prefix() -> list[str | Placeholder]:
    """Return the words before a question about a video and its audio track; the audio comes first."""
    between, after = f".{_GAP}{_FRAMES}<Video>", f"</Video>.{_GAP} {_QUESTION} seen and heard."
    return [_AUDIO, Placeholder("audio"), between, Placeholder("image"), after]


def media_prefix(frames: Sequence[Any], audio: Any | None = None) -> list[str | Placeholder]:
    """Return the words before a question about any media, up to and with the space that joins the question.

    Args:
        frames: videos and images in order: `VideoFrames`, or tensors (frames, 3, height, width), of which
            those of one frame are still images. Audio belongs to the first of them.
        audio: an audio item (only whether there is one matters), or None.

    Returns:
        items of a message's content; empty if there is nothing to introduce.
    """
    prefixes: list[list[str | Placeholder]] = []
    if audio is not None:
        prefixes.append(video_with_audio_prefix() if frames else audio_prefix())
    for item in frames[len(prefixes) :]:
        kind = getattr(item, "kind", None) or ("image" if len(item) == 1 else "video")
        if kind == "image":
            prefixes.append(image_prefix())
        else:
            prefixes.append(video_prefix(getattr(item, "message", "")))
    return [part for prefix in prefixes for part in (*prefix, " ")]
