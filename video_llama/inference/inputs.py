"""What callers give `VideoLlama.generate`: checked, and brought to one form."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from video_llama.conversation import Conversation
from video_llama.processor.media_processor import AudioSegments, VideoFrames
from video_llama.processor.tensor_like import as_frames, as_segments

__all__ = ["check_conversation", "given_audio", "given_frames"]


def given_frames(imgs: Any) -> list[VideoFrames | Tensor]:
    """The videos and images, tensors among them as (frames, 3, height, width).

    Args:
        imgs: one video or image, a list of them, or None.

    Raises:
        TypeError: something else, such as a file that was not read, or a list of frames that may be one video or
            several images.
        MediaError: a tensor of another form.
    """
    if imgs is None:
        return []
    items = list(imgs) if isinstance(imgs, (list, tuple)) else [imgs]
    for item in items:
        if isinstance(item, AudioSegments):
            raise TypeError("imgs is a sound: give it as audio")
        if not isinstance(item, (VideoFrames, Tensor)):
            raise TypeError(
                f"imgs is {_describe(item)}, not what process_video or process_images return: read it first, "
                "imgs, audio = process_video(path, model.processor.media_processor)"
            )
    if len(items) > 1 and all(isinstance(item, Tensor) and item.ndim == 3 for item in items):
        raise TypeError(
            f"imgs is {len(items)} tensors of one frame each: torch.stack(imgs) is a video of them, "
            "[img[None] for img in imgs] are images of their own"
        )
    return [as_frames(item) if isinstance(item, Tensor) else item for item in items]


def given_audio(audio: Any) -> AudioSegments | Tensor | None:
    """The sound; a tensor as (segments, 1, mel_bins, mel_frames).

    Raises:
        TypeError: something else, such as a file that was not read.
        MediaError: a tensor of another form.
    """
    if isinstance(audio, VideoFrames):
        raise TypeError("audio is frames: give them as imgs")
    if audio is not None and not isinstance(audio, (AudioSegments, Tensor)):
        raise TypeError(
            f"audio is {_describe(audio)}, not what process_video or process_audio return: read it first, "
            "audio = process_audio(path, model.processor.media_processor)"
        )
    return as_segments(audio) if isinstance(audio, Tensor) else audio


def check_conversation(conv: Any) -> Conversation | None:
    """The conversation.

    Raises:
        TypeError: something else, such as a question.
    """
    if conv is None or isinstance(conv, Conversation):
        return conv
    raise TypeError(
        f"conv is {_describe(conv)}, not a conversation: conv = model.new_conversation(); conv.ask('What is this?')"
    )


def _describe(value: Any) -> str:
    """The type of a value, and what it says if that is short."""
    is_short = isinstance(value, (str, os.PathLike)) and len(str(value)) <= 200
    return f"{type(value).__name__} {str(value)!r}" if is_short else type(value).__name__
