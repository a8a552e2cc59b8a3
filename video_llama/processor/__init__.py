"""Files and texts to tensors and tokens: videos, images, audio, captions, prompts."""

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

_BUILDERS = {"load_processor", "process_audio", "process_images", "process_video"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the decoders take a while to load."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "builders" if name in _BUILDERS else "media_processor"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
