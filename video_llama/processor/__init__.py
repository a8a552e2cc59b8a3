"""Files and texts to tensors and tokens: videos, images, sounds, captions, prompts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_llama.processor.builders import load_processor, process_audio, process_images, process_video
    from video_llama.processor.media_processor import AudioSegments, MediaProcessor, VideoFrames

__all__ = [
    "AudioSegments",
    "MediaProcessor",
    "VideoFrames",
    "load_processor",
    "process_audio",
    "process_images",
    "process_video",
]

_HOMES = {
    **dict.fromkeys(("AudioSegments", "MediaProcessor", "VideoFrames"), "video_llama.processor.media_processor"),
    **dict.fromkeys(
        ("load_processor", "process_audio", "process_images", "process_video"),
        "video_llama.processor.builders",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the decoders take a while to load."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
