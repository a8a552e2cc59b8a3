"""What goes into the model: encoded media, prompts, and the checked arguments of `VideoLlama.generate`."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from video_llama.conversation import Conversation
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.tensor_like import as_frames, as_segments

__all__ = ["EncodedMedia", "Kind", "Prompt", "check_audio", "check_conversation", "check_frames"]


Kind = Literal["image", "audio"]
"""Of placeholders: "image" stands for a video as well."""


@dataclass(frozen=True, eq=False)
class EncodedMedia:
    """One media item as the language model sees it: features (tokens, language_width)."""

    kind: Kind
    features: Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be continued.

    Args:
        keys: what stands at each position: a token id, or a media item and the number of its token.
        inputs_embeds: (1, length, language_width).
        stop_strings: texts that end the answer.
    """

    keys: list[Hashable]
    inputs_embeds: Tensor
    stop_strings: list[str]


def check_frames(imgs: Any) -> list[VideoFrames | Tensor]:
    """Return videos and images as a list, tensors among them as (frames, 3, height, width).

    Args:
        imgs: one video or image, a list of them, or None.

    Raises:
        TypeError: something else, such as a path, or a list of single frames (one video or several images?).
        MediaError: a tensor of another shape.
    """
    if imgs is None:
        return []
    items = list(imgs) if isinstance(imgs, (list, tuple)) else [imgs]
    for item in items:
        if isinstance(item, AudioSegments):
            raise TypeError("imgs is audio: pass it as audio")
        if not isinstance(item, (VideoFrames, Tensor)):
            raise TypeError(
                f"imgs is {_describe(item)}, not what process_video or process_images return: read it first, "
                "imgs, audio = process_video(path, model.processor.media_processor)"
            )
    if len(items) > 1 and all(isinstance(item, Tensor) and item.ndim == 3 for item in items):
        raise TypeError(
            f"imgs is {len(items)} tensors of one frame each: torch.stack(imgs) is a video of them, "
            "[img[None] for img in imgs] are separate images"
        )
    return [as_frames(item) if isinstance(item, Tensor) else item for item in items]


def check_audio(audio: Any) -> AudioSegments | Tensor | None:
    """Return the audio; a tensor as (segments, 1, mel_bins, mel_frames).

    Raises:
        TypeError: something else, such as a path.
        MediaError: a tensor of another shape.
    """
    if isinstance(audio, VideoFrames):
        raise TypeError("audio is frames: pass them as imgs")
    if isinstance(audio, Tensor):
        return as_segments(audio)
    if audio is None or isinstance(audio, AudioSegments):
        return audio
    raise TypeError(
        f"audio is {_describe(audio)}, not what process_video or process_audio return: read it first, "
        "audio = process_audio(path, model.processor.media_processor)"
    )


def check_conversation(conv: Any) -> Conversation | None:
    """Return the conversation.

    Raises:
        TypeError: something else, such as a question.
    """
    if conv is None or isinstance(conv, Conversation):
        return conv
    raise TypeError(
        f"conv is {_describe(conv)}, not a conversation: conv = model.new_conversation(); conv.ask('What is this?')"
    )


def _describe(value: Any) -> str:
    """Return the type of a value, with the value itself if it is a short text or path."""
    name = type(value).__name__
    if isinstance(value, (str, os.PathLike)) and len(str(value)) <= 200:
        return f"{name} {str(value)!r}"
    return name
